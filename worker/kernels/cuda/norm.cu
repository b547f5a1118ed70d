// Row-wise operations between matrix products: residual sums, root-mean-square norms, the gate of the feed-forward
// network. All are limited by bytes: each element is read and written once, eight at a time where the width allows.

typedef unsigned short bf16;

static __device__ __forceinline__ float widen(bf16 x) { return __uint_as_float((unsigned)x << 16); }
static __device__ __forceinline__ float low(unsigned x) { return __uint_as_float(x << 16); }
static __device__ __forceinline__ float high(unsigned x) { return __uint_as_float(x & 0xffff0000u); }
static __device__ __forceinline__ unsigned pack(float lo, float hi) {
    unsigned x;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(hi), "f"(lo));
    return x;
}
static __device__ __forceinline__ bf16 narrow(float x) { return (bf16)pack(x, 0.0f); }

// A kernel of a chain may begin before the one it depends on is done: it says when its own successor may begin, and waits
// before it touches what others wrote.
static __device__ __forceinline__ void chain() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The sum over the block's 256 threads; every thread gets it.
static __device__ __forceinline__ float block_sum(float x) {
    __shared__ float warps[8];
    for (int n = 16; n; n >>= 1) x += __shfl_xor_sync(~0u, x, n);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
    __syncthreads();
    float sum = 0.0f;
    for (int i = 0; i < 8; ++i) sum += warps[i];
    return sum;
}

// One block a row: `residual += partial` (nothing where `partial` is null), `normed` is its norm times `weight`.
// `vectors` is 1 where width divides by 8.
extern "C" __global__ void __launch_bounds__(256) add_norm(float* __restrict__ residual,
                                                            const bf16* __restrict__ partial,
                                                            const float* __restrict__ weight,
                                                            bf16* __restrict__ normed, float eps, unsigned width,
                                                            unsigned vectors) {
    chain();
    float* x = residual + (size_t)blockIdx.x * width;
    const bf16* y = partial ? partial + (size_t)blockIdx.x * width : nullptr;
    bf16* out = normed + (size_t)blockIdx.x * width;
    float squares = 0.0f;
    if (vectors) {
        // The first rounds stay in registers, so that rows of up to 8192 are read once, and
        // weights are on their way while the squares are summed.
        constexpr unsigned KEPT = 4;
        float4 kept[KEPT][2], weights[KEPT][2];
        const unsigned n = width / 8;
#pragma unroll
        for (unsigned round = 0; round < KEPT; ++round) {
            const unsigned i = round * 256 + threadIdx.x;
            if (i >= n) break;
            weights[round][0] = reinterpret_cast<const float4*>(weight)[2 * i];
            weights[round][1] = reinterpret_cast<const float4*>(weight)[2 * i + 1];
            float4 a = reinterpret_cast<const float4*>(x)[2 * i], b = reinterpret_cast<const float4*>(x)[2 * i + 1];
            if (y) {
                const uint4 p = reinterpret_cast<const uint4*>(y)[i];
                a.x += low(p.x), a.y += high(p.x), a.z += low(p.y), a.w += high(p.y);
                b.x += low(p.z), b.y += high(p.z), b.z += low(p.w), b.w += high(p.w);
                reinterpret_cast<float4*>(x)[2 * i] = a;
                reinterpret_cast<float4*>(x)[2 * i + 1] = b;
            }
            squares += a.x * a.x + a.y * a.y + a.z * a.z + a.w * a.w;
            squares += b.x * b.x + b.y * b.y + b.z * b.z + b.w * b.w;
            kept[round][0] = a, kept[round][1] = b;
        }
        for (unsigned i = KEPT * 256 * 8 + threadIdx.x; i < width; i += 256) {
            const float sum = x[i] + (y ? widen(y[i]) : 0.0f);
            x[i] = sum;
            squares += sum * sum;
        }
        const float scale = rsqrtf(block_sum(squares) / (float)width + eps);
#pragma unroll
        for (unsigned round = 0; round < KEPT; ++round) {
            const unsigned i = round * 256 + threadIdx.x;
            if (i >= n) break;
            const float4 a = kept[round][0], b = kept[round][1];
            const float4 u = weights[round][0], v = weights[round][1];
            uint4 p;
            p.x = pack(a.x * scale * u.x, a.y * scale * u.y);
            p.y = pack(a.z * scale * u.z, a.w * scale * u.w);
            p.z = pack(b.x * scale * v.x, b.y * scale * v.y);
            p.w = pack(b.z * scale * v.z, b.w * scale * v.w);
            reinterpret_cast<uint4*>(out)[i] = p;
        }
        for (unsigned i = KEPT * 256 * 8 + threadIdx.x; i < width; i += 256) out[i] = narrow(x[i] * scale * weight[i]);
        return;
    }
    for (unsigned i = threadIdx.x; i < width; i += 256) {
        const float sum = x[i] + (y ? widen(y[i]) : 0.0f);
        x[i] = sum;
        squares += sum * sum;
    }
    const float scale = rsqrtf(block_sum(squares) / (float)width + eps);
    for (unsigned i = threadIdx.x; i < width; i += 256) out[i] = narrow(x[i] * scale * weight[i]);
}

static __device__ __forceinline__ float gated(float gate, float up) { return gate / (1.0f + __expf(-gate)) * up; }

// `out[row] = silu(gate) * up`; a row of `gate_up` holds both, `width` each. Blocks of x share a row.
extern "C" __global__ void __launch_bounds__(256) silu_mul(const bf16* __restrict__ gate_up, bf16* __restrict__ out,
                                                            unsigned width, unsigned vectors) {
    chain();
    const bf16* gate = gate_up + (size_t)blockIdx.y * 2 * width;
    bf16* to = out + (size_t)blockIdx.y * width;
    const unsigned stride = gridDim.x * 256;
    if (vectors) {
        for (unsigned i = blockIdx.x * 256 + threadIdx.x; i < width / 8; i += stride) {
            const uint4 g = reinterpret_cast<const uint4*>(gate)[i];
            const uint4 u = reinterpret_cast<const uint4*>(gate + width)[i];
            uint4 p;
            p.x = pack(gated(low(g.x), low(u.x)), gated(high(g.x), high(u.x)));
            p.y = pack(gated(low(g.y), low(u.y)), gated(high(g.y), high(u.y)));
            p.z = pack(gated(low(g.z), low(u.z)), gated(high(g.z), high(u.z)));
            p.w = pack(gated(low(g.w), low(u.w)), gated(high(g.w), high(u.w)));
            reinterpret_cast<uint4*>(to)[i] = p;
        }
        return;
    }
    for (unsigned i = blockIdx.x * 256 + threadIdx.x; i < width; i += stride)
        to[i] = narrow(gated(widen(gate[i]), widen(gate[width + i])));
}
