// Products of few rows with a large matrix: what decoding small batches does. Limited by the bytes of the matrix, which
// are read once; sixteen rows or fewer share the read.
//
// A block has sixteen rows of the matrix; its eight warps divide the contiguous dimension, 64 numbers a turn each, and
// add up at the end, in order. The tensor cores see the matrix as their left operand and the activations as their right
// one. A thread's sixteen bytes of a row are eight numbers in a line; which of them meets which step of the multiplication
// does not matter, as long as both operands agree, so nothing is moved between registers. The first turns of the matrix
// are on their way before the kernel that makes the activations is done.

typedef unsigned short bf16;

#define WARPS 8
#define TURN (WARPS * 64)  // numbers of a row that a block reads in a turn
#define AHEAD 4            // turns whose pieces of the matrix are on their way

static __device__ __forceinline__ void await_inputs() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
static __device__ __forceinline__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
static __device__ __forceinline__ bf16 narrow(float x) {
    bf16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}
static __device__ __forceinline__ void put(bf16* to, float x) { *to = narrow(x); }
static __device__ __forceinline__ void put(float* to, float x) { *to = x; }

// Read once: not kept where others' data would have to go.
static __device__ __forceinline__ uint4 stream(const bf16* from) {
    uint4 x;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "l"(from));
    return x;
}
static __device__ __forceinline__ void multiply(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3,
                                                unsigned b0, unsigned b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// `out[m, n] = x[m, k] * w[n, k]^T`; n divides by 16, k by AHEAD turns. EIGHTS is m in eights, rounded up.
template <int EIGHTS, class OUT>
static __device__ __forceinline__ void product(const bf16* __restrict__ x, const bf16* __restrict__ w,
                                               OUT* __restrict__ out, unsigned m, unsigned n, unsigned k) {
    const unsigned warp = threadIdx.x / 32, row = threadIdx.x % 32 / 4, piece = threadIdx.x % 4;
    const unsigned first = blockIdx.x * 16, turns = k / TURN;
    const bf16* low = w + (size_t)(first + row) * k + warp * 64 + piece * 8;
    const bf16* high = low + (size_t)8 * k;
    uint4 a[AHEAD][4];
    const auto fetch = [&](uint4(&to)[4], unsigned turn) {
        to[0] = stream(low + turn * TURN);
        to[1] = stream(high + turn * TURN);
        to[2] = stream(low + turn * TURN + 32);
        to[3] = stream(high + turn * TURN + 32);
    };
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) fetch(a[i], i);
    let_next_begin();
    await_inputs();
    const bf16* rows[EIGHTS];
    float c[EIGHTS][4];
#pragma unroll
    for (int e = 0; e < EIGHTS; ++e) {
        // Rows beyond the last compute what nobody stores.
        rows[e] = x + (size_t)min(e * 8 + row, m - 1) * k + warp * 64 + piece * 8;
        c[e][0] = c[e][1] = c[e][2] = c[e][3] = 0.0f;
    }
#pragma unroll 1
    for (unsigned turn = 0; turn < turns; turn += AHEAD) {
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            const unsigned at = (turn + i) * TURN;
#pragma unroll
            for (int e = 0; e < EIGHTS; ++e) {
                const uint4 b = *reinterpret_cast<const uint4*>(rows[e] + at);
                const uint4 d = *reinterpret_cast<const uint4*>(rows[e] + at + 32);
                multiply(c[e], a[i][0].x, a[i][1].x, a[i][0].y, a[i][1].y, b.x, b.y);
                multiply(c[e], a[i][0].z, a[i][1].z, a[i][0].w, a[i][1].w, b.z, b.w);
                multiply(c[e], a[i][2].x, a[i][3].x, a[i][2].y, a[i][3].y, d.x, d.y);
                multiply(c[e], a[i][2].z, a[i][3].z, a[i][2].w, a[i][3].w, d.z, d.w);
            }
            if (turn + AHEAD + i < turns) fetch(a[i], turn + AHEAD + i);
        }
    }
    __shared__ float sums[WARPS][EIGHTS * 8][16 + 1];
#pragma unroll
    for (int e = 0; e < EIGHTS; ++e)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[warp][e * 8 + piece * 2 + i % 2][row + i / 2 * 8] = c[e][i];
    __syncthreads();
    for (unsigned i = threadIdx.x; i < m * 16; i += WARPS * 32) {
        float sum = 0.0f;
#pragma unroll
        for (int s = 0; s < WARPS; ++s) sum += sums[s][i / 16][i % 16];
        put(out + (size_t)(i / 16) * n + first + i % 16, sum);
    }
}

#define PRODUCT(NAME, EIGHTS, OUT)                                                                                   \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, 2)                                                       \
        NAME(const bf16* x, const bf16* w, OUT* out, unsigned m, unsigned n, unsigned k) {                            \
        product<EIGHTS>(x, w, out, m, n, k);                                                                          \
    }
PRODUCT(product_8, 1, bf16)
PRODUCT(product_16, 2, bf16)
PRODUCT(product_8_f32, 1, float)
PRODUCT(product_16_f32, 2, float)
