// In place of MLX's header of this name, which is written in Apple's builtins.

#define BF16_UNARY(NAME) \
  METAL_FUNC bfloat16_t NAME(bfloat16_t x) { return bfloat16_t(NAME((float)x)); }

#define BF16_BINARY(NAME)                                      \
  METAL_FUNC bfloat16_t NAME(bfloat16_t x, bfloat16_t y) {     \
    return bfloat16_t(NAME((float)x, (float)y));               \
  }

namespace metal {

BF16_UNARY(abs)
BF16_UNARY(ceil)
BF16_UNARY(cos)
BF16_UNARY(exp)
BF16_UNARY(exp2)
BF16_UNARY(fabs)
BF16_UNARY(floor)
BF16_UNARY(log)
BF16_UNARY(log2)
BF16_UNARY(rint)
BF16_UNARY(round)
BF16_UNARY(rsqrt)
BF16_UNARY(sin)
BF16_UNARY(sqrt)
BF16_UNARY(tanh)
BF16_UNARY(trunc)
BF16_BINARY(fmax)
BF16_BINARY(fmin)
BF16_BINARY(max)
BF16_BINARY(min)
BF16_BINARY(pow)

}  // namespace metal
