"""A plain Hydra application over hpcdl's own configs: what composing them costs with hydra.main."""

import hydra
from omegaconf import DictConfig


@hydra.main(version_base=None, config_path=None, config_name="config")
def main(cfg: DictConfig) -> None:
    print(cfg)


if __name__ == "__main__":
    main()
