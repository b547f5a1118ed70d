// Products of some rows with a large matrix, for Hopper alone: wgmma fed by the copy engine. What decoding batches of 9 to
// 256 sequences does; `skinny.cu` has fewer rows, the library more.
//
// The multiplication's left operand is the matrix, 128 rows of it a block, 64 a warpgroup; the activations, padded to
// ROWS, are its right one: so few of them waste nothing. One warp does nothing but start copies; the blocks of a cluster
// share them. `across` blocks have the same part of the contiguous dimension and different rows of the matrix: each brings
// a slice of the activations for all of them. `parts` blocks have the same rows and different parts of the contiguous
// dimension: in the end each adds up a share of all their sums, in order. So there are as many blocks as fit the
// multiprocessors, whatever the matrix's shape, and each reads as much of it as any other. Two blocks fit a multiprocessor
// up to 128 rows: the next kernel's copies of its matrix run while this one ends.

typedef unsigned short bf16;
typedef unsigned long long u64;

#define TILE 128                   // rows of the matrix that a block has
#define STEP 64                    // numbers of a row that are copied at a time: 128 bytes
#define TILE_BYTES (TILE * STEP * 2)
#define CONSUMERS 256
#define THREADS (CONSUMERS + 32)
#define STAGES_MAX 6

static __device__ __forceinline__ unsigned address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }

static __device__ __forceinline__ bf16 narrow(float x) {
    bf16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}

// A matrix in shared memory whose rows of 128 bytes are swizzled; groups of eight rows follow each other.
static __device__ __forceinline__ u64 matrix(unsigned at) {
    return (u64)(at >> 4 & 0x3fff) | (u64)(1024 >> 4) << 32 | 1ull << 62;
}

#define D8(d, i)                                                                                                     \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]),       \
        "+f"(d[i + 7])
#define D16(d, i) D8(d, i), D8(d, i + 8)
#define D32(d, i) D16(d, i), D16(d, i + 16)
#define N0 "%0,%1,%2,%3,%4,%5,%6,%7"
#define N1 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define N2 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define N3 ",%24,%25,%26,%27,%28,%29,%30,%31"
#define N4 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define N5 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define N6 ",%48,%49,%50,%51,%52,%53,%54,%55"
#define N7 ",%56,%57,%58,%59,%60,%61,%62,%63"

// d[64, N] = (or +=) a[64, 16] x b[N, 16]^T, both in shared memory. A, B and P name the operands after the sums.
#define MULTIPLY(N, NAMES, A, B, P, ...)                                                                             \
    static __device__ __forceinline__ void multiply(float (&d)[N / 2], u64 a, u64 b, int add) {                       \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P ", 0;\n"                                                   \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" NAMES "}, " A ", " B                 \
                     ", p, 1, 1, 0, 0;\n}\n"                                                                          \
                     : __VA_ARGS__                                                                                   \
                     : "l"(a), "l"(b), "r"(add));                                                                    \
    }
MULTIPLY(16, N0, "%8", "%9", "%10", D8(d, 0))
MULTIPLY(32, N0 N1, "%16", "%17", "%18", D16(d, 0))
MULTIPLY(48, N0 N1 N2, "%24", "%25", "%26", D16(d, 0), D8(d, 16))
MULTIPLY(64, N0 N1 N2 N3, "%32", "%33", "%34", D32(d, 0))
MULTIPLY(80, N0 N1 N2 N3 N4, "%40", "%41", "%42", D32(d, 0), D8(d, 32))
MULTIPLY(96, N0 N1 N2 N3 N4 N5, "%48", "%49", "%50", D32(d, 0), D16(d, 32))
MULTIPLY(112, N0 N1 N2 N3 N4 N5 N6, "%56", "%57", "%58", D32(d, 0), D16(d, 32), D8(d, 48))
MULTIPLY(128, N0 N1 N2 N3 N4 N5 N6 N7, "%64", "%65", "%66", D32(d, 0), D32(d, 32))

static __device__ __forceinline__ void begin_multiplications() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
static __device__ __forceinline__ void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT>
static __device__ __forceinline__ void await_multiplications() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

static __device__ __forceinline__ void barrier_init(unsigned bar, unsigned n) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(n) : "memory");
}
static __device__ __forceinline__ void barrier_expect(unsigned bar, unsigned bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
// Of another block of the cluster, or this one.
static __device__ __forceinline__ void barrier_arrive(unsigned bar, unsigned block) {
    asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
                 "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];\n}\n" ::"r"(bar),
                 "r"(block)
                 : "memory");
}
static __device__ __forceinline__ void barrier_wait(unsigned bar, unsigned phase) {
    asm volatile("{\n.reg .pred done;\nAGAIN:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra GONE;\nbra AGAIN;\nGONE:\n}\n" ::"r"(bar),
                 "r"(phase)
                 : "memory");
}
static __device__ __forceinline__ void cluster_meet() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// A number in the shared memory of another block of the cluster.
static __device__ __forceinline__ float load_from(unsigned at, unsigned block) {
    float x;
    asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %1, %2;\n"
                 "ld.shared::cluster.f32 %0, [there];\n}\n"
                 : "=f"(x)
                 : "r"(at), "r"(block));
    return x;
}

// A box of the matrix, which is read once.
static __device__ __forceinline__ void copy_weights(unsigned to, const void* map, int x, int y, unsigned bar, u64 policy) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
                 "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
                 "l"(map), "r"(x), "r"(y), "r"(bar), "l"(policy)
                 : "memory");
}
// A box of the activations, to the same place in several blocks of the cluster.
static __device__ __forceinline__ void copy_shared(unsigned to, const void* map, int x, int y, unsigned bar,
                                                   unsigned short blocks, u64 policy) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
                 ".L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5, %6;" ::"r"(to),
                 "l"(map), "r"(x), "r"(y), "r"(bar), "h"(blocks), "l"(policy)
                 : "memory");
}

struct Barriers {
    u64 full[STAGES_MAX], free[STAGES_MAX];
};

// What a block has to do: where in the cluster it is, and which chunks of the contiguous dimension are its own.
struct Share {
    unsigned across, parts, column, part, row, first, chunks;
};

// The warp that starts copies; one thread of it.
template <int ROWS, int STAGES>
static __device__ __forceinline__ void bring(const void* map_w, const void* map_x, const Share& share, unsigned w,
                                             unsigned x, Barriers* bars) {
    u64 once, often;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(once));
    asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(often));
    const unsigned slice = ROWS / share.across, mine = share.column * slice;
    const unsigned short blocks = (unsigned short)(((1u << share.across) - 1) << share.part * share.across);
    const auto weights = [&](unsigned i) {
        const unsigned stage = i % STAGES, bar = address(&bars->full[stage]);
        barrier_expect(bar, TILE_BYTES + ROWS * STEP * 2);
        copy_weights(w + stage * TILE_BYTES, map_w, (share.first + i) * STEP, share.row, bar, once);
    };
    const auto activations = [&](unsigned i) {
        const unsigned stage = i % STAGES, bar = address(&bars->full[stage]);
        const unsigned to = x + stage * ROWS * STEP * 2 + mine * STEP * 2;
        copy_shared(to, map_x, (share.first + i) * STEP, mine, bar, blocks, often);
    };
    const unsigned ahead = min(share.chunks, (unsigned)STAGES);
    // Weights depend on nobody: they are on their way before the kernel that makes the activations is done.
    for (unsigned i = 0; i < ahead; ++i) weights(i);
    asm volatile("griddepcontrol.wait;" ::: "memory");
    for (unsigned i = 0; i < ahead; ++i) activations(i);
    for (unsigned i = ahead; i < share.chunks; ++i) {
        barrier_wait(address(&bars->free[i % STAGES]), (i / STAGES - 1) % 2);
        weights(i);
        activations(i);
    }
}

template <int ROWS, int STAGES>
static __device__ __forceinline__ void product(const void* map_w, const void* map_x, void* __restrict__ out, unsigned m,
                                               unsigned n, unsigned k, unsigned across, unsigned parts, unsigned wide) {
    constexpr int HALVES = ROWS > 128 ? 2 : 1, N = ROWS / HALVES;
    extern __shared__ __align__(1024) unsigned char shared[];
    __shared__ __align__(8) Barriers bars;
    const unsigned base = (address(shared) + 1023) & ~1023u, w = base, x = w + STAGES * TILE_BYTES;
    const unsigned size = across * parts, rank = blockIdx.x % size, all = k / STEP;
    Share share;
    share.across = across, share.parts = parts, share.column = rank % across, share.part = rank / across;
    share.row = (blockIdx.x / size * across + share.column) * TILE;
    share.first = share.part * all / parts, share.chunks = (share.part + 1) * all / parts - share.first;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(address(&bars.full[i]), 1);
            barrier_init(address(&bars.free[i]), 2 * across);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    cluster_meet();

    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = warp / 4;
    float d[HALVES][N / 2];
    if (warp == CONSUMERS / 32) {
        if (lane == 0) bring<ROWS, STAGES>(map_w, map_x, share, w, x, &bars);
        __syncwarp();
    } else {
#pragma unroll 1
        for (unsigned i = 0; i < share.chunks; ++i) {
            const unsigned stage = i % STAGES;
            barrier_wait(address(&bars.full[stage]), i / STAGES % 2);
            begin_multiplications();
#pragma unroll
            for (int step = 0; step < STEP / 16; ++step)
#pragma unroll
                for (int h = 0; h < HALVES; ++h)
                    multiply(d[h], matrix(w + stage * TILE_BYTES + group * (TILE_BYTES / 2) + step * 32),
                             matrix(x + stage * ROWS * STEP * 2 + h * N * STEP * 2 + step * 32), i + step > 0);
            commit();
            await_multiplications<1>();
            // The chunk before this one is multiplied: its stage is free, here and where its activations came from.
            if (i > 0 && threadIdx.x % 128 < across)
                barrier_arrive(address(&bars.free[(i - 1) % STAGES]), share.part * across + threadIdx.x % 128);
        }
        await_multiplications<0>();
#pragma unroll
        for (int h = 0; h < HALVES; ++h)
#pragma unroll
            for (int i = 0; i < N / 2; ++i) asm volatile("" : "+f"(d[h][i])::"memory");
        asm volatile("griddepcontrol.wait;" ::: "memory");
    }
    const unsigned row = share.row + warp * 16 + lane / 4, column = lane % 4 * 2;
    // Sum i of a thread: four of them are a pair of columns of a row and of the row eight below.
    const auto store = [&](int h, int i, float sum) {
        const unsigned at_m = h * N + i / 4 * 8 + column + i % 2, at_n = row + i % 4 / 2 * 8;
        if (at_m >= m || at_n >= n) return;
        const size_t at = (size_t)at_m * n + at_n;
        if (wide)
            ((float*)out)[at] = sum;
        else
            ((bf16*)out)[at] = narrow(sum);
    };
    if (parts == 1) {
        if (warp < CONSUMERS / 32) {
#pragma unroll
            for (int h = 0; h < HALVES; ++h)
#pragma unroll
                for (int i = 0; i < N / 2; ++i) store(h, i, d[h][i]);
        }
        cluster_meet();  // Nobody ends while others may still say that its stages are free.
        return;
    }
    // Every block's sums go to its shared memory, where nothing is under way any more.
    float* sums = (float*)(shared + (base - address(shared)));
    if (warp < CONSUMERS / 32) {
        asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory");
#pragma unroll
        for (int h = 0; h < HALVES; ++h)
#pragma unroll
            for (int i = 0; i < N / 2; ++i) sums[(h * (N / 2) + i) * CONSUMERS + threadIdx.x] = d[h][i];
    }
    cluster_meet();
    if (warp < CONSUMERS / 32) {
        const unsigned each = ROWS / 2 / parts, begin = share.part * each;
#pragma unroll 2
        for (unsigned j = begin; j < begin + each; ++j) {
            float part[8];
#pragma unroll
            for (unsigned p = 0; p < 8; ++p)
                if (p < parts) part[p] = load_from(base + (j * CONSUMERS + threadIdx.x) * 4, p * across + share.column);
            float sum = part[0];
#pragma unroll
            for (unsigned p = 1; p < 8; ++p)
                if (p < parts) sum += part[p];
            store(j / (N / 2), j % (N / 2), sum);
        }
    }
    cluster_meet();  // Nobody ends while others may still read its sums.
}

#define PRODUCT(ROWS, STAGES, BLOCKS)                                                                                \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)                                                     \
        product_hopper_##ROWS(const unsigned char* map_w, const unsigned char* map_x, void* out, unsigned m,          \
                              unsigned n, unsigned k, unsigned across, unsigned parts, unsigned wide) {               \
        product<ROWS, STAGES>(map_w, map_x, out, m, n, k, across, parts, wide);                                       \
    }
PRODUCT(16, 6, 2)
PRODUCT(32, 5, 2)
PRODUCT(48, 5, 2)
PRODUCT(64, 4, 2)
PRODUCT(80, 4, 2)
PRODUCT(96, 3, 2)
PRODUCT(112, 3, 2)
PRODUCT(128, 3, 2)
PRODUCT(160, 6, 1)
PRODUCT(192, 5, 1)
PRODUCT(224, 5, 1)
PRODUCT(256, 4, 1)
