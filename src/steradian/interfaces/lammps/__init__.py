"""``pair_style steradian`` of LAMMPS.

:mod:`.build` compiles the plugin ``pair_steradian.cpp``, :mod:`.export` writes a model for it, :mod:`.pair` is what the
plugin calls in every step, :mod:`.exchange` what processes tell each other.
"""
