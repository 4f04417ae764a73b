"""Which plots a sweep's page has."""
def scaling(r): return []
def by_key(r): return []
def curves(r): return []
