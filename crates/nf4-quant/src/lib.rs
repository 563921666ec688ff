//! 4-bit NF4 and FP4 block quantization: scalar oracle, parallel host codec and CubeCL kernels
