"""The diffusion transformer: `model` is read first.

model: layers, block, SVGDiT, table of sizes. attention: the one attention function. packing: samples of different
lengths as one sequence. cpu_kernels: the same formulas faster on a CPU. flops: operations of a training step.
"""
