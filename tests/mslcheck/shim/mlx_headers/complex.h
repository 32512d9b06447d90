// In place of MLX's header of this name, whose constructors clang rejects: kernels
// with complex numbers are not covered.

template <typename T>
struct complex_t {
  T real;
  T imag;
  constexpr complex_t(T real = 0, T imag = 0) : real(real), imag(imag) {}
};

typedef complex_t<float> complex64_t;

template <typename T>
static constexpr constant bool is_complex_v = false;
