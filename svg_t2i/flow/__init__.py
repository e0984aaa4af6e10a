"""Flow matching, on torch alone.

paths: paths from noise to data, timesteps, the loss. solvers: ODE solvers and their time grids. guidance: a guided
model as a velocity.
"""
