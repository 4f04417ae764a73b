"""How large a checkpoint of an experiment will be, in closed form."""

from __future__ import annotations

from hpcdl import compress
from hpcdl.plan.memory import STATE_BYTES
from hpcdl.spec import ExperimentSpec
from hpcdl.spec.layout import matrices


def checkpoint_bytes(spec: ExperimentSpec) -> int | None:
    """Bytes of one checkpoint: what is trained, in fp32, and the optimizer's state of it.

    Strategies whose ranks differ save more; it is a lower bound for them.

    Returns:
        None where the model's dimensions are nobody's word here (weights from the hub), or the optimizer's
        state is of unknown size.
    """
    shape, optim = spec.model.shape, spec.optim
    if shape is None or optim.name not in STATE_BYTES:
        return None
    method = compress.get(spec.peft.name)
    numbers = 0
    for matrix in matrices(shape):
        one = method.memory(spec.peft, matrix).parameters
        numbers += matrix.count * (one if compress.freezes_base(spec) else one + matrix.numel)
    state = 0.0 if optim.name == "sgd" and not optim.momentum else STATE_BYTES[optim.name]
    return round(numbers * (4 + state))
