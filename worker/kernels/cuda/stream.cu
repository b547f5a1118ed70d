// Reading memory from one end to the other: what a kernel that only reads can reach.

typedef unsigned long long u64;

static __device__ __forceinline__ unsigned mixed(uint4 x) { return x.x ^ x.y ^ x.z ^ x.w; }

// `n` vectors of sixteen bytes. The sum keeps the reads from being left out; of zeros it is never the one that is stored.
extern "C" __global__ void __launch_bounds__(512) read_stream(const uint4* __restrict__ from, u64 n,
                                                               unsigned* __restrict__ sink) {
    const u64 stride = (u64)gridDim.x * blockDim.x;
    u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    unsigned sum = 0;
    for (; i + 3 * stride < n; i += 4 * stride) {
        const uint4 a = __ldcs(from + i), b = __ldcs(from + i + stride);
        const uint4 c = __ldcs(from + i + 2 * stride), d = __ldcs(from + i + 3 * stride);
        sum += mixed(a) ^ mixed(b) ^ mixed(c) ^ mixed(d);
    }
    for (; i < n; i += stride) sum += mixed(__ldcs(from + i));
    if (sum == 0x5EED5EEDu) *sink = sum;
}
