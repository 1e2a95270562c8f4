"""Sparse autoencoders in other people's files, read and written: one module a format.

Each has `detect(path)`, `read(path) -> (arrays, settings)` as `models.sae.build` takes them, `write(path, sae)`, and
`outputs(path, x_bd)`, the format's own formulas in float64, by which a conversion is checked.
"""
