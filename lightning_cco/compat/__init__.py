"""Private APIs of PyTorch, Lightning and others that have no public counterpart: each behind one name, with what happens without it.

`table` lists them all. Nothing else of the package reads a private name of another one. In the import order it is below every other module but `errors`.
"""
