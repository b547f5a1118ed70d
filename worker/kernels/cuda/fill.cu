// Dummy weights: see `RandomTensor`, whose bits these are.

typedef unsigned short bf16;
typedef unsigned long long u64;

static __device__ __forceinline__ u64 mix(u64 z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

// The sum of the eight bytes of a word.
static __device__ __forceinline__ int bytes(u64 word) {
    const unsigned ones = 0x01010101u;
    return (int)__dp4a((unsigned)word, ones, __dp4a((unsigned)(word >> 32), ones, 0u));
}

// Rows `first_row ..` and columns `first_column .. first_column + columns` of a tensor of `width` columns.
extern "C" __global__ void __launch_bounds__(256) fill_random(bf16* __restrict__ to, u64 key, u64 first_row,
                                                               u64 first_column, u64 width, u64 columns, u64 n,
                                                               float unit) {
    const u64 stride = (u64)gridDim.x * blockDim.x;
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += stride) {
        const u64 place = (first_row + i / columns) * width + first_column + i % columns;
        const u64 step = 0x9E3779B97F4A7C15ull;
        const int sum = bytes(mix(key + (2 * place + 1) * step)) + bytes(mix(key + (2 * place + 2) * step));
        const float x = __int2float_rn(sum - 2040) * unit;
        bf16 rounded;
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded) : "f"(x));
        to[i] = rounded;
    }
}
