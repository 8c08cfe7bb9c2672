// The kernels of one model step on a GPU, for one model's shape: sizes are macros, which `kernels.py` defines, so that
// loops unroll and indices fold.
//
// A step of a few rows only streams the weights through the chip once. Gaps between kernels keep it from doing so at full
// speed. So there are few kernels, five a layer, and each starts before the previous one has ended (programmatic dependent
// launch): it loads its weights, which are constant, and only then waits for its input.
//
//     product NORM|BIAS   x --> q, k, v                      product NORM|SILU   x --> silu(gate) * up
//     attend              q, k, v, cache --> attention       product RESIDUAL    x += down(...)
//     product RESIDUAL    x += o(attention)
//
// For a single row, gemv replaces product: sums over lanes then cost less than tensor cores that are mostly idle.
// With more rows, matrix products are cuBLAS's, and rms_norm, rope_write, attend and silu_mul stand between them.
//
// A row is one token of one sequence. Where rows of a step belong to the same sequence (a prompt), rope_write has stored the
// keys of all of them before attend reads any; with one row per sequence attend does both, and saves a kernel.
//
// Arithmetic is float32, memory bfloat16. A row with a negative position is padding: nothing is written for it.

typedef unsigned short bf16;
typedef unsigned int u32;
typedef unsigned long long u64;

#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif

#define GROUP (HEADS / KV_HEADS)          // query heads that share keys and values
#define HALF (HEAD_DIM / 2)
#define LANES_PER_KEY (HEAD_DIM / 8)      // a lane holds 8 elements, 16 bytes
#define QKV ((HEADS + 2 * KV_HEADS) * HEAD_DIM)
#define WARPS_PER_BLOCK 8

enum { NORM = 1, BIAS = 2, RESIDUAL = 4, SILU = 8, FLOAT = 16, PICK = 32 };

#ifndef EMULATED
__device__ __forceinline__ void wait_for_input() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
#endif

__device__ __forceinline__ float to_float(bf16 value) { return __uint_as_float((u32)value << 16); }

__device__ __forceinline__ bf16 to_bf16(float value) {  // to nearest, ties to even
    u32 bits = __float_as_uint(value);
    return (bf16)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

__device__ __forceinline__ float rounded(float value) { return to_float(to_bf16(value)); }

__device__ __forceinline__ void unpack(uint4 packed, float* out) {
    u32 words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        out[2 * i] = __uint_as_float(words[i] << 16);
        out[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
}

__device__ __forceinline__ u32 pack2(float low, float high) { return (u32)to_bf16(low) | ((u32)to_bf16(high) << 16); }

__device__ __forceinline__ uint4 pack(const float* in) {
    return make_uint4(pack2(in[0], in[1]), pack2(in[2], in[3]), pack2(in[4], in[5]), pack2(in[6], in[7]));
}

__device__ __forceinline__ float sum_over(float value, int lanes) {  // of each group of so many lanes
    for (int offset = lanes / 2; offset; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
    return value;
}

// out = W f(x) for one column x of K elements; W is [n, K]. ROWS rows of W belong to each group of WARPS warps, which split K
// among them. NORM: f is RMS normalisation. SILU: rows of W alternate between gate and up. PICK: the column is x[pick[0]].
template <int K, int WARPS, int ROWS, int FLAGS>
__global__ void __launch_bounds__(256)
gemv(const bf16* weights, const bf16* x, void* out, int n, const bf16* bias, const bf16* norm, const int* pick) {
    constexpr int CHUNKS = K / 8, LANES = 32 * WARPS, PER = (CHUNKS + LANES - 1) / LANES, GROUPS = WARPS_PER_BLOCK / WARPS;
    constexpr int OUT = (FLAGS & SILU) ? ROWS / 2 : ROWS;
    __shared__ float partial[WARPS_PER_BLOCK][ROWS + 1];
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, part = warp % WARPS;
    int row = (blockIdx.x * GROUPS + warp / WARPS) * ROWS;
    uint4 w[ROWS][PER], scale[PER];
#pragma unroll
    for (int j = 0; j < PER; j++) {
        int chunk = (j * WARPS + part) * 32 + lane;
#pragma unroll
        for (int r = 0; r < ROWS; r++)
            w[r][j] = chunk < CHUNKS && row + r < n ? __ldcs((const uint4*)(weights + (size_t)(row + r) * K) + chunk)
                                                    : make_uint4(0, 0, 0, 0);
        if (FLAGS & NORM) scale[j] = chunk < CHUNKS ? *((const uint4*)norm + chunk) : make_uint4(0, 0, 0, 0);
    }
    let_next_start();
    wait_for_input();
    const uint4* column = (const uint4*)(x + (size_t)((FLAGS & PICK) ? pick[0] : 0) * K);
    float sums[ROWS + 1];
#pragma unroll
    for (int r = 0; r <= ROWS; r++) sums[r] = 0.f;
#pragma unroll
    for (int j = 0; j < PER; j++) {
        int chunk = (j * WARPS + part) * 32 + lane;
        float f[8], g[8];
        unpack(chunk < CHUNKS ? __ldcg(column + chunk) : make_uint4(0, 0, 0, 0), f);
        if (FLAGS & NORM) {
            unpack(scale[j], g);
#pragma unroll
            for (int q = 0; q < 8; q++) {
                sums[ROWS] = fmaf(f[q], f[q], sums[ROWS]);
                f[q] *= g[q];
            }
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            unpack(w[r][j], g);
#pragma unroll
            for (int q = 0; q < 8; q++) sums[r] = fmaf(g[q], f[q], sums[r]);
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS + ((FLAGS & NORM) ? 1 : 0); r++) sums[r] = sum_over(sums[r], 32);
    float mine = 0.f, up = 0.f, squares = 0.f;
    if (WARPS == 1) {
#pragma unroll
        for (int r = 0; r < OUT; r++)
            if (lane == r) {
                mine = sums[(FLAGS & SILU) ? 2 * r : r];
                if (FLAGS & SILU) up = sums[2 * r + 1];
            }
        squares = sums[ROWS];
    } else {
        if (lane == 0) {
#pragma unroll
            for (int r = 0; r <= ROWS; r++) partial[warp][r] = sums[r];
        }
        __syncthreads();
        if (part == 0 && lane < OUT)
            for (int other = warp; other < warp + WARPS; other++) {
                mine += partial[other][(FLAGS & SILU) ? 2 * lane : lane];
                if (FLAGS & SILU) up += partial[other][2 * lane + 1];
                squares += partial[other][ROWS];
            }
    }
    if (part == 0 && lane < OUT) {
        int at = (FLAGS & SILU) ? row / 2 + lane : row + lane, width = (FLAGS & SILU) ? n / 2 : n;
        if (at < width) {
            if (FLAGS & NORM) {
                float rms = rsqrtf(squares / K + EPSILON);
                mine *= rms;
                up *= rms;
            }
            size_t index = at;
            if (FLAGS & SILU) mine = mine / (1.f + expf(-mine)) * up;
            if (FLAGS & BIAS) mine += to_float(bias[at]);
            if (FLAGS & RESIDUAL) mine += to_float(((bf16*)out)[index]);
            if (FLAGS & FLOAT) ((float*)out)[index] = mine;
            else ((bf16*)out)[index] = to_bf16(mine);
        }
    }
}

// Adds A B to a warp's 16 x 8 tile: A is 16 x 16, B is 16 x 8, as in PTX's mma.m16n8k16.
#ifndef EMULATED
__device__ __forceinline__ void multiply_add(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
#endif

// out = W f(x) for up to 8 * EIGHTS columns x of K elements; W is [n, K]. A block has TILES tiles of 16 rows of W; the other
// warps split K. NORM: f is RMS normalisation. SILU: rows of W alternate between gate and up. PICK: column c is x[pick[c]].
//
// The tensor cores multiply, although there is little to multiply: so no sum has to be passed between lanes. The order of
// the elements of K does not matter if it is the same on both sides: each lane reads 8 adjacent ones.
template <int K, int TILES, int EIGHTS, int FLAGS>
__global__ void __launch_bounds__(256, 2)
product(const bf16* weights, const bf16* x, void* out, int n, int columns, const bf16* bias, const bf16* norm, const int* pick) {
    constexpr int PARTS = WARPS_PER_BLOCK / TILES, CHUNKS = K / 8, STEPS = (CHUNKS + 4 * PARTS - 1) / (4 * PARTS);
    constexpr int DEPTH = STEPS < 8 ? STEPS : 8, SIZE = 128 * EIGHTS;
    __shared__ float sums[WARPS_PER_BLOCK][SIZE], squares[WARPS_PER_BLOCK][8 * EIGHTS];
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, part = warp % PARTS, group = lane >> 2;
    int row = (blockIdx.x * TILES + warp / PARTS) * 16 + group;
    const uint4 nothing = make_uint4(0, 0, 0, 0);
    const uint4* upper = (const uint4*)(weights + (size_t)row * K);
    const uint4* lower = (const uint4*)(weights + (size_t)(row + 8) * K);
    uint4 a[DEPTH][2];
#pragma unroll
    for (int i = 0; i < DEPTH; i++) {
        int chunk = (i * PARTS + part) * 4 + (lane & 3);
        a[i][0] = chunk < CHUNKS && row < n ? __ldcs(upper + chunk) : nothing;
        a[i][1] = chunk < CHUNKS && row + 8 < n ? __ldcs(lower + chunk) : nothing;
    }
    let_next_start();
    wait_for_input();
    const uint4* inputs[EIGHTS];
    float c[EIGHTS][4], square[EIGHTS];
#pragma unroll
    for (int e = 0; e < EIGHTS; e++) {
        int column = e * 8 + group;
        inputs[e] = column < columns ? (const uint4*)(x + (size_t)((FLAGS & PICK) ? pick[column] : column) * K) : nullptr;
        c[e][0] = c[e][1] = c[e][2] = c[e][3] = square[e] = 0.f;
    }
#pragma unroll 1
    for (int base = 0; base < STEPS; base += DEPTH) {
#pragma unroll
        for (int i = 0; i < DEPTH; i++) {
            int chunk = ((base + i) * PARTS + part) * 4 + (lane & 3);
            bool there = base + i < STEPS && chunk < CHUNKS;
            float f[8], g[8];
            if (FLAGS & NORM) unpack(there ? *((const uint4*)norm + chunk) : nothing, g);
#pragma unroll
            for (int e = 0; e < EIGHTS; e++) {
                uint4 b = there && inputs[e] ? __ldcg(inputs[e] + chunk) : nothing;
                if (FLAGS & NORM) {
                    unpack(b, f);
#pragma unroll
                    for (int q = 0; q < 8; q++) {
                        square[e] = fmaf(f[q], f[q], square[e]);
                        f[q] *= g[q];
                    }
                    b = pack(f);
                }
                multiply_add(c[e], a[i][0].x, a[i][1].x, a[i][0].y, a[i][1].y, b.x, b.y);
                multiply_add(c[e], a[i][0].z, a[i][1].z, a[i][0].w, a[i][1].w, b.z, b.w);
            }
            int later = ((base + i + DEPTH) * PARTS + part) * 4 + (lane & 3);
            bool more = base + i + DEPTH < STEPS && later < CHUNKS;
            a[i][0] = more && row < n ? __ldcs(upper + later) : nothing;
            a[i][1] = more && row + 8 < n ? __ldcs(lower + later) : nothing;
        }
    }
#pragma unroll
    for (int e = 0; e < EIGHTS; e++) {  // a lane holds rows group and group + 8 of two columns
#pragma unroll
        for (int i = 0; i < 4; i++)
            sums[warp][(e * 8 + (lane & 3) * 2 + (i & 1)) * 16 + group + (i >> 1) * 8] = c[e][i];
        if (FLAGS & NORM) {
            square[e] = sum_over(square[e], 4);
            if ((lane & 3) == 0) squares[warp][e * 8 + group] = square[e];
        }
    }
    __syncthreads();
    constexpr int ROWS = (FLAGS & SILU) ? 8 : 16;  // of the result, in a tile
    int width = (FLAGS & SILU) ? n / 2 : n;
    for (int i = threadIdx.x; i < TILES * ROWS * columns; i += 256) {
        int column = i / (TILES * ROWS), tile = i / ROWS % TILES, r = i % ROWS, at = (blockIdx.x * TILES + tile) * ROWS + r;
        if (at >= width) continue;
        float value = 0.f, up = 0.f, all = 0.f;
#pragma unroll
        for (int p = 0; p < PARTS; p++) {
            const float* its = sums[tile * PARTS + p] + column * 16;
            value += its[(FLAGS & SILU) ? 2 * r : r];
            if (FLAGS & SILU) up += its[2 * r + 1];
            if (FLAGS & NORM) all += squares[tile * PARTS + p][column];
        }
        if (FLAGS & NORM) {
            float rms = rsqrtf(all / K + EPSILON);
            value *= rms;
            up *= rms;
        }
        size_t index = (size_t)column * width + at;
        if (FLAGS & SILU) value = value / (1.f + expf(-value)) * up;
        if (FLAGS & BIAS) value += to_float(bias[at]);
        if (FLAGS & RESIDUAL) value += to_float(((bf16*)out)[index]);
        if (FLAGS & FLOAT) ((float*)out)[index] = value;
        else ((bf16*)out)[index] = to_bf16(value);
    }
}

// Computes eight elements of a head after its norm (QK_NORM) and its rotary embedding, for this lane of the head's lanes.
// `rope` holds, for each position, HALF cosines and HALF sines; elements are paired by halves, as in GPT-NeoX.
__device__ __forceinline__ void rotated(const bf16* head, const bf16* norm, const float* rope, int position, int lane, float* out) {
    int other = lane ^ (LANES_PER_KEY / 2);
    float a[8], b[8];
    unpack(__ldcg((const uint4*)head + lane), a);
    unpack(__ldcg((const uint4*)head + other), b);
#if QK_NORM
    float squares = 0.f;
#pragma unroll
    for (int q = 0; q < 8; q++) squares = fmaf(a[q], a[q], squares);
    float rms = rsqrtf(sum_over(squares, LANES_PER_KEY) / HEAD_DIM + EPSILON);
#pragma unroll
    for (int q = 0; q < 8; q++) {
        a[q] *= rms * to_float(norm[lane * 8 + q]);
        b[q] *= rms * to_float(norm[other * 8 + q]);
    }
#endif
    const float* cosines = rope + (size_t)position * HEAD_DIM + (lane % (LANES_PER_KEY / 2)) * 8;
    bool first = lane < LANES_PER_KEY / 2;
#pragma unroll
    for (int q = 0; q < 8; q++) {
        float sine = cosines[HALF + q] * b[q];
        out[q] = rounded(a[q] * cosines[q] + (first ? -sine : sine));
    }
}

// Returns the offset of a position's key (which = 0) or value (1) in [blocks, LAYERS, 2, BLOCK, KV_HEADS, HEAD_DIM].
__device__ __forceinline__ size_t place(const int* table, int position, int layer, int which, int head) {
    size_t block = (size_t)table[position / BLOCK] * LAYERS + layer;
    return (((block * 2 + which) * BLOCK + position % BLOCK) * KV_HEADS + head) * HEAD_DIM;
}

// One block computes HPB query heads of one row and one part of its keys. Each lane group of each warp processes different
// keys and keeps a running maximum and a sum (online softmax). These are merged at the end over the lane groups, the warps
// and, by the last block, over the parts. `listed`, if given, lists the rows to compute and is padded with -1.
template <int HPB, int FUSED, int UNROLL>
__global__ void __launch_bounds__(256)
attend(const bf16* qkv, bf16* cache, const int* tables, int table_width, const int* slots, const int* positions,
       const float* rope, const bf16* q_norm, const bf16* k_norm, bf16* out, float* parts, u32* arrived, int layer,
       const int* listed) {
    constexpr int KEYS = 32 / LANES_PER_KEY, STRIDE = WARPS_PER_BLOCK * KEYS;
    __shared__ float top[WARPS_PER_BLOCK][HPB], total[WARPS_PER_BLOCK][HPB], sums[WARPS_PER_BLOCK][HPB][HEAD_DIM];
    __shared__ int last;
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, group = lane / LANES_PER_KEY, d = lane % LANES_PER_KEY;
    int head = blockIdx.x * HPB, kv = head / GROUP, row = listed ? listed[blockIdx.y] : (int)blockIdx.y, splits = gridDim.z;
    if (row < 0) {
        wait_for_input();
        return;
    }
    int position = positions[row], length = position + 1;
    int span = ((length + splits - 1) / splits + 255) / 256 * 256, from = blockIdx.z * span, to = min(length, from + span);
    const int* table = tables + (size_t)slots[row] * table_width;
    const bf16* mine = qkv + (size_t)row * QKV;
    uint4 keys[UNROLL], values[UNROLL];
    auto load = [&](int base) {
#pragma unroll
        for (int i = 0; i < UNROLL; i++) {
            int j = base + i * STRIDE + warp * KEYS + group;
            bool stored = j < to && !(FUSED && j == position);
            const bf16* at = cache + (stored ? place(table, j, layer, 0, kv) : 0);
            keys[i] = stored ? __ldcg((const uint4*)at + d) : make_uint4(0, 0, 0, 0);
            values[i] = stored ? __ldcg((const uint4*)(at + BLOCK * KV_HEADS * HEAD_DIM) + d) : make_uint4(0, 0, 0, 0);
        }
    };
    let_next_start();
    if (FUSED) load(from);  // earlier steps have written these
    wait_for_input();  // also if there is nothing to do: later kernels may rely on earlier ones having ended
    if (from >= length) return;
    if (!FUSED) load(from);
    int used = (length + span - 1) / span;

    float q[HPB][8], new_key[8], new_value[8];
#pragma unroll
    for (int h = 0; h < HPB; h++) {
        if (FUSED) rotated(mine + (head + h) * HEAD_DIM, q_norm, rope, position, d, q[h]);
        else unpack(__ldcg((const uint4*)(mine + (head + h) * HEAD_DIM) + d), q[h]);
#pragma unroll
        for (int e = 0; e < 8; e++) q[h][e] *= SCALE;
    }
    if (FUSED) {
        uint4 value = __ldcg((const uint4*)(mine + (HEADS + KV_HEADS + kv) * HEAD_DIM) + d);
        rotated(mine + (HEADS + kv) * HEAD_DIM, k_norm, rope, position, d, new_key);
        unpack(value, new_value);
        if (head % GROUP == 0 && to == length && warp == 0 && group == 0) {
            *((uint4*)(cache + place(table, position, layer, 0, kv)) + d) = pack(new_key);
            *((uint4*)(cache + place(table, position, layer, 1, kv)) + d) = value;
        }
    }

    float highest[HPB], weight[HPB], acc[HPB][8];
#pragma unroll
    for (int h = 0; h < HPB; h++) {
        highest[h] = -1e30f;
        weight[h] = 0.f;
#pragma unroll
        for (int e = 0; e < 8; e++) acc[h][e] = 0.f;
    }
    for (int base = from; base < to; base += STRIDE * UNROLL) {
        if (base > from) load(base);
        float scores[HPB][UNROLL];
#pragma unroll
        for (int i = 0; i < UNROLL; i++) {
#pragma unroll
            for (int h = 0; h < HPB; h++) scores[h][i] = -1e30f;
            if (base + i * STRIDE >= to) continue;  // for all warps alike
            int j = base + i * STRIDE + warp * KEYS + group;
            float key[8];
            unpack(keys[i], key);
            if (FUSED && j == position) {
#pragma unroll
                for (int e = 0; e < 8; e++) key[e] = new_key[e];
            }
#pragma unroll
            for (int h = 0; h < HPB; h++) {
                float score = 0.f;
#pragma unroll
                for (int e = 0; e < 8; e++) score = fmaf(q[h][e], key[e], score);
                score = sum_over(score, LANES_PER_KEY);
                scores[h][i] = j < to ? score : -1e30f;
            }
        }
#pragma unroll
        for (int h = 0; h < HPB; h++) {
            float higher = highest[h];
#pragma unroll
            for (int i = 0; i < UNROLL; i++) higher = fmaxf(higher, scores[h][i]);
            float shrink = expf(highest[h] - higher);
            highest[h] = higher;
            weight[h] *= shrink;
#pragma unroll
            for (int e = 0; e < 8; e++) acc[h][e] *= shrink;
        }
#pragma unroll
        for (int i = 0; i < UNROLL; i++) {
            if (base + i * STRIDE >= to) continue;
            int j = base + i * STRIDE + warp * KEYS + group;
            float value[8];
            unpack(values[i], value);
            if (FUSED && j == position) {
#pragma unroll
                for (int e = 0; e < 8; e++) value[e] = new_value[e];
            }
#pragma unroll
            for (int h = 0; h < HPB; h++) {
                float p = j < to ? expf(scores[h][i] - highest[h]) : 0.f;
                weight[h] += p;
#pragma unroll
                for (int e = 0; e < 8; e++) acc[h][e] = fmaf(p, value[e], acc[h][e]);
            }
        }
    }

#pragma unroll
    for (int h = 0; h < HPB; h++) {
        float higher = highest[h];
        for (int offset = LANES_PER_KEY; offset < 32; offset *= 2)
            higher = fmaxf(higher, __shfl_xor_sync(0xffffffffu, higher, offset));
        float shrink = expf(highest[h] - higher);
        weight[h] *= shrink;
        for (int offset = LANES_PER_KEY; offset < 32; offset *= 2)
            weight[h] += __shfl_xor_sync(0xffffffffu, weight[h], offset);
#pragma unroll
        for (int e = 0; e < 8; e++) {
            acc[h][e] *= shrink;
            for (int offset = LANES_PER_KEY; offset < 32; offset *= 2)
                acc[h][e] += __shfl_xor_sync(0xffffffffu, acc[h][e], offset);
            if (group == 0) sums[warp][h][d * 8 + e] = acc[h][e];
        }
        if (lane == 0) {
            top[warp][h] = higher;
            total[warp][h] = weight[h];
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < HPB * HEAD_DIM; i += 256) {
        int h = i / HEAD_DIM, e = i % HEAD_DIM;
        float higher = -1e30f, sum = 0.f, all = 0.f;
        for (int other = 0; other < WARPS_PER_BLOCK; other++) higher = fmaxf(higher, top[other][h]);
        for (int other = 0; other < WARPS_PER_BLOCK; other++) {
            float shrink = expf(top[other][h] - higher);
            sum += sums[other][h][e] * shrink;
            all += total[other][h] * shrink;
        }
        if (used == 1) {
            out[((size_t)row * HEADS + head + h) * HEAD_DIM + e] = to_bf16(sum / all);
        } else {
            float* part = parts + (((size_t)row * HEADS + head + h) * splits + blockIdx.z) * (HEAD_DIM + 2);
            part[e] = sum;
            if (e == 0) {
                part[HEAD_DIM] = higher;
                part[HEAD_DIM + 1] = all;
            }
        }
    }
    if (used == 1) return;

    __threadfence();
    __syncthreads();
    u32* counter = arrived + row * gridDim.x + blockIdx.x;
    if (threadIdx.x == 0) last = atomicAdd(counter, 1u) == (u32)used - 1;
    __syncthreads();
    if (!last) return;
    if (threadIdx.x == 0) *counter = 0;
    __threadfence();
    for (int i = threadIdx.x; i < HPB * HEAD_DIM; i += 256) {
        int h = i / HEAD_DIM, e = i % HEAD_DIM;
        const float* part = parts + ((size_t)row * HEADS + head + h) * splits * (HEAD_DIM + 2);
        float higher = -1e30f, sum = 0.f, all = 0.f;
        for (int s = 0; s < used; s++) higher = fmaxf(higher, __ldcg(part + s * (HEAD_DIM + 2) + HEAD_DIM));
        for (int s = 0; s < used; s++) {
            const float* its = part + s * (HEAD_DIM + 2);
            float shrink = expf(__ldcg(its + HEAD_DIM) - higher);
            sum += __ldcg(its + e) * shrink;
            all += __ldcg(its + HEAD_DIM + 1) * shrink;
        }
        out[((size_t)row * HEADS + head + h) * HEAD_DIM + e] = to_bf16(sum / all);
    }
}

// The first kernel of a step: applies changes to the block tables and loads each row's embedding. If `sources` is not
// negative, the row's token is that row of the last step's draws, which the host need not have read yet.
__global__ void begin(const int* changes, int* tables, int table_width, const int* sources, const int* tokens,
                      const int* drawn, const bf16* embedding, bf16* x) {
    int number = changes[0];
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < number; i += gridDim.x * blockDim.x) {
        const int* change = changes + 1 + 3 * i;
        tables[(size_t)change[0] * table_width + change[1]] = change[2];
    }
    int row = blockIdx.x, token = sources[row] >= 0 ? drawn[sources[row]] : tokens[row];
    const uint4* from = (const uint4*)(embedding + (size_t)token * HIDDEN);
    for (int i = threadIdx.x; i < HIDDEN / 8; i += blockDim.x) ((uint4*)(x + (size_t)row * HIDDEN))[i] = from[i];
}

// Applies the rotary embedding to all rows' queries and keys, in place, and stores keys and values in the cache.
__global__ void __launch_bounds__(256)
rope_write(bf16* qkv, bf16* cache, const int* tables, int table_width, const int* slots, const int* positions,
           const float* rope, const bf16* q_norm, const bf16* k_norm, int layer) {
    constexpr int ALL = (HEADS + 2 * KV_HEADS) * LANES_PER_KEY, ROUNDED = (ALL + 31) / 32 * 32;
    int row = blockIdx.x;
    let_next_start();
    wait_for_input();
    int position = positions[row];
    if (position < 0) return;
    const int* table = tables + (size_t)slots[row] * table_width;
    bf16* mine = qkv + (size_t)row * QKV;
    for (int i = threadIdx.x; i < ROUNDED; i += 256) {
        int head = min(i, ALL - 1) / LANES_PER_KEY, lane = i % LANES_PER_KEY;
        bool query = head < HEADS, key = !query && head < HEADS + KV_HEADS;
        uint4* at = (uint4*)(mine + head * HEAD_DIM) + lane;
        float turned[8];
        rotated(mine + head * HEAD_DIM, query ? q_norm : k_norm, rope, position, lane, turned);
        __syncwarp();
        if (i >= ALL) continue;
        if (query || key) *at = pack(turned);
        if (query) continue;
        if (key) *((uint4*)(cache + place(table, position, layer, 0, head - HEADS)) + lane) = pack(turned);
        else *((uint4*)(cache + place(table, position, layer, 1, head - HEADS - KV_HEADS)) + lane) = *at;
    }
}

__global__ void __launch_bounds__(256) rms_norm(const bf16* x, const bf16* weight, bf16* out, const int* pick) {
    __shared__ float squares[WARPS_PER_BLOCK];
    constexpr int CHUNKS = HIDDEN / 8;
    let_next_start();
    wait_for_input();
    const uint4* in = (const uint4*)(x + (size_t)(pick ? pick[blockIdx.x] : blockIdx.x) * HIDDEN);
    float f[8], g[8], sum = 0.f;
    for (int i = threadIdx.x; i < CHUNKS; i += 256) {
        unpack(in[i], f);
#pragma unroll
        for (int q = 0; q < 8; q++) sum = fmaf(f[q], f[q], sum);
    }
    sum = sum_over(sum, 32);
    if ((threadIdx.x & 31) == 0) squares[threadIdx.x >> 5] = sum;
    __syncthreads();
    sum = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS_PER_BLOCK; w++) sum += squares[w];
    float rms = rsqrtf(sum / HIDDEN + EPSILON);
    for (int i = threadIdx.x; i < CHUNKS; i += 256) {
        unpack(in[i], f);
        unpack(((const uint4*)weight)[i], g);
#pragma unroll
        for (int q = 0; q < 8; q++) f[q] *= rms * g[q];
        ((uint4*)(out + (size_t)blockIdx.x * HIDDEN))[i] = pack(f);
    }
}

// Maps [rows, 2 · INTERMEDIATE] of alternating gate and up to [rows, INTERMEDIATE].
__global__ void __launch_bounds__(256) silu_mul(const bf16* gate_up, bf16* out) {
    let_next_start();
    wait_for_input();
    int i = blockIdx.y * 256 + threadIdx.x;
    if (i >= INTERMEDIATE / 4) return;
    float f[8], y[4];
    unpack(((const uint4*)(gate_up + (size_t)blockIdx.x * 2 * INTERMEDIATE))[i], f);
#pragma unroll
    for (int q = 0; q < 4; q++) y[q] = f[2 * q] / (1.f + expf(-f[2 * q])) * f[2 * q + 1];
    ((uint2*)(out + (size_t)blockIdx.x * INTERMEDIATE))[i] = make_uint2(pack2(y[0], y[1]), pack2(y[2], y[3]));
}

// ---- from logits to tokens ----

__device__ __forceinline__ u32 ordered(float value) {  // larger floats are larger integers
    u32 bits = __float_as_uint(value);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// A rank by value; among equal values, the smaller token ranks higher. Never 0, which means no token.
__device__ __forceinline__ u64 order(float value, int token) { return ((u64)ordered(value) << 32) | (u32)~token; }

__device__ __forceinline__ u32 mixed(u32 x) {  // MurmurHash3's 32-bit finaliser
    x ^= x >> 16;
    x *= 0x85ebca6bu;
    x ^= x >> 13;
    x *= 0xc2b2ae35u;
    return x ^ x >> 16;
}

// Returns standard Gumbel noise of a token: a function of the draw's key and the token alone.
__device__ __forceinline__ float gumbel(u32 low, u32 high, int token) {
    u32 bits = mixed(mixed((u32)token * 0x9e3779b1u + low) ^ high);
    return -logf(-log1pf(-fminf(((float)bits + 0.5f) * 2.3283064365386963e-10f, 0.99999994f)));
}

// Calls `use(value, token)` for every logit of a row that is not minus infinity; `blocks` blocks share the row.
template <typename Use>
__device__ __forceinline__ void for_each_logit(const float* logits, int block, int blocks, Use use) {
#if VOCABULARY % 4 == 0
    const float4* fours = (const float4*)logits;
#pragma unroll 4
    for (int i = block * blockDim.x + threadIdx.x; i < VOCABULARY / 4; i += blocks * blockDim.x) {
        float4 four = fours[i];
        if (four.x > -INFINITY) use(four.x, 4 * i);
        if (four.y > -INFINITY) use(four.y, 4 * i + 1);
        if (four.z > -INFINITY) use(four.z, 4 * i + 2);
        if (four.w > -INFINITY) use(four.w, 4 * i + 3);
    }
#else
    for (int token = block * blockDim.x + threadIdx.x; token < VOCABULARY; token += blocks * blockDim.x)
        if (logits[token] > -INFINITY) use(logits[token], token);
#endif
}

__device__ __forceinline__ u64 highest_of_block(u64 value, u64* shared) {
    for (int offset = 16; offset; offset /= 2) {
        u64 other = __shfl_xor_sync(0xffffffffu, value, offset);
        value = other > value ? other : value;
    }
    __syncthreads();
    if ((threadIdx.x & 31) == 0) shared[threadIdx.x >> 5] = value;
    __syncthreads();
    value = shared[0];
    for (u32 w = 1; w < blockDim.x / 32; w++) value = shared[w] > value ? shared[w] : value;
    return value;
}

// Draws one token per row: the largest of logit / temperature + noise among those not below the row's cut (Gumbel-max). A
// temperature of 0 selects the likeliest. Blocks share a row; the last one writes its token to `drawn`, for the next step,
// and to the `turn`th array of `hosts`, for the host.
__global__ void __launch_bounds__(256)
choose(const float* logits, const float* temperatures, const u32* keys, const u64* cuts, u64* best, u32* arrived,
       int* drawn, int* hosts, const int* turn, int host_size) {
    __shared__ u64 shared[WARPS_PER_BLOCK];
    int row = blockIdx.y;
    let_next_start();
    wait_for_input();
    float temperature = temperatures[row];
    u32 low = keys[2 * row], high = keys[2 * row + 1];
    u64 cut = cuts[row], winner = 0;
    for_each_logit(logits + (size_t)row * VOCABULARY, blockIdx.x, gridDim.x, [&](float value, int token) {
        if (cut && order(value, token) < cut) return;
        if (temperature > 0.f) value = value / temperature + gumbel(low, high, token);
        u64 candidate = order(value, token);
        winner = candidate > winner ? candidate : winner;
    });
    winner = highest_of_block(winner, shared);
    if (threadIdx.x != 0) return;
    atomicMax(best + row, winner);
    __threadfence();
    if (atomicAdd(arrived + row, 1u) != gridDim.x - 1) return;
    winner = atomicExch(best + row, 0ull);
    arrived[row] = 0;
    int token = winner ? (int)~(u32)winner : 0;
    drawn[row] = token;
    hosts[(size_t)*turn * host_size + row] = token;
}

// `truncate` cuts each row's distribution: tokens whose `order` is below `cuts[row]` cannot be drawn. Top-k comes first,
// then top-p of the remaining tokens, then min-p. One block per row. A histogram of the logits finds the bin of the
// cut, whose tokens are then compared one by one. Masses are integers, so that sums do not depend on their order.
#define BINS 2048
#define LISTED 1024

__device__ __forceinline__ u64 mass_of(float value, float top, float temperature) {
    return (u64)(expf((value - top) / temperature) * 4294967296.f);
}

// Returns the lowest `order` that is kept: those above it have less than `most` in all (tokens, or mass with `by_mass`).
__device__ u64 find_cut(const float* logits, float top, float bottom, float temperature, u64 floor, bool by_mass, u64 most,
                        u32* counts, u64* masses, u64* listed, u64* listed_mass, u64* sums, u64* shared) {
    float near = 0.f, far = top - bottom;
    u64 before = 0;
    for (int round = 0; round < 6; round++) {
        float scale = BINS / fmaxf(far - near, 1e-30f);
        for (int b = threadIdx.x; b < BINS; b += blockDim.x) counts[b] = 0, masses[b] = 0;
        __syncthreads();
        for_each_logit(logits, 0, 1, [&](float value, int token) {
            float distance = top - value;
            if (order(value, token) < floor || distance < near || distance > far) return;
            int bin = min(BINS - 1, (int)((distance - near) * scale));
            atomicAdd(counts + bin, 1u);
            if (by_mass) atomicAdd(masses + bin, mass_of(value, top, temperature));
        });
        __syncthreads();
        if (threadIdx.x < 64) {  // sums of 32 bins each, so that one thread need not read all bins
            u64 sum = 0;
            for (int b = threadIdx.x * 32; b < threadIdx.x * 32 + 32; b++) sum += by_mass ? masses[b] : counts[b];
            sums[threadIdx.x] = sum;
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            u64 sum = before;
            int bin = 0;
            while (bin < BINS && sum + sums[bin / 32] < most) sum += sums[bin / 32], bin += 32;
            for (; bin < BINS; bin++) {
                u64 its = by_mass ? masses[bin] : counts[bin];
                if (sum + its >= most && counts[bin]) break;
                sum += its;
            }
            shared[0] = sum;
            shared[1] = bin;
            shared[2] = 0;
        }
        __syncthreads();
        before = shared[0];
        int found = (int)shared[1];
        if (found == BINS) return floor;  // all tokens together have less than `most`
        u32 number = counts[found];
        float low = near, high = far;
        if (number <= LISTED) {
            for_each_logit(logits, 0, 1, [&](float value, int token) {
                float distance = top - value;
                if (order(value, token) < floor || distance < low || distance > high) return;
                if (min(BINS - 1, (int)((distance - low) * scale)) != found) return;
                u32 at = (u32)atomicAdd(shared + 2, 1ull);
                listed[at] = order(value, token);
                listed_mass[at] = by_mass ? mass_of(value, top, temperature) : 1;
            });
            __syncthreads();
            u64 kept = 0;  // the complement of the lowest order that is kept
            for (u32 i = threadIdx.x; i < number; i += blockDim.x) {
                u64 sum = before;
                for (u32 j = 0; j < number; j++)
                    if (listed[j] > listed[i]) sum += listed_mass[j];
                if (sum < most && ~listed[i] > kept) kept = ~listed[i];
            }
            kept = highest_of_block(kept, shared + 8);
            u64 cut = kept ? ~kept : floor;
            __syncthreads();
            return cut > floor ? cut : floor;
        }
        near = low + found / scale;
        far = low + (found + 1) / scale;
        __syncthreads();
    }
    return floor;  // more equal logits than can be listed: all of them are kept
}

__global__ void __launch_bounds__(1024)
truncate(const float* logits, const float* temperatures, const int* top_ks, const float* top_ps, const float* min_ps, u64* cuts) {
    __shared__ u32 counts[BINS];
    __shared__ u64 masses[BINS], listed[LISTED], listed_mass[LISTED], sums[64], shared[48];
    int row = blockIdx.x, top_k = top_ks[row];
    float temperature = temperatures[row], top_p = top_ps[row], min_p = min_ps[row];
    const float* mine = logits + (size_t)row * VOCABULARY;
    if (temperature <= 0.f || (top_k <= 0 && top_p >= 1.f && min_p <= 0.f)) {
        if (threadIdx.x == 0) cuts[row] = 0;
        return;
    }
    u64 most = 0, least = 0;  // of the ordered logits, and of their complements
    for_each_logit(mine, 0, 1, [&](float value, int token) {
        u64 its = order(value, token), inverse = ~its;
        most = its > most ? its : most;
        least = inverse > least ? inverse : least;
    });
    most = highest_of_block(most, shared);
    least = highest_of_block(least, shared);
    if (most == 0) {
        if (threadIdx.x == 0) cuts[row] = 0;
        return;
    }
    u32 high = (u32)(most >> 32), low = (u32)(~least >> 32);
    float top = __uint_as_float(high & 0x80000000u ? high & 0x7fffffffu : ~high);
    float bottom = __uint_as_float(low & 0x80000000u ? low & 0x7fffffffu : ~low);
    u64 cut = 0;
    if (top_k > 0 && top_k < VOCABULARY)
        cut = find_cut(mine, top, bottom, temperature, cut, false, (u64)top_k, counts, masses, listed, listed_mass, sums, shared);
    __syncthreads();
    if (top_p < 1.f) {
        if (threadIdx.x == 0) shared[3] = 0;
        __syncthreads();
        u64 sum = 0;
        for_each_logit(mine, 0, 1, [&](float value, int token) {
            if (order(value, token) >= cut) sum += mass_of(value, top, temperature);
        });
        atomicAdd(shared + 3, sum);
        __syncthreads();
        u64 limit = (u64)((double)shared[3] * top_p);
        __syncthreads();
        u64 found = find_cut(mine, top, bottom, temperature, cut, true, limit ? limit : 1, counts, masses, listed,
                             listed_mass, sums, shared);
        cut = found > cut ? found : cut;
    }
    if (min_p > 0.f) {
        u64 found = (u64)ordered(top + temperature * logf(min_p)) << 32;
        cut = found > cut ? found : cut;
    }
    if (threadIdx.x == 0) cuts[row] = cut > most ? most : cut;
}

// ---- transfers ----

// Copies blocks of `size` pieces of 16 bytes: the i-th goes from from[i] to to[i]. Either side may be another GPU's memory.
__global__ void __launch_bounds__(256)
move_blocks(const uint4* source, const long long* from, uint4* target, const long long* to, int number, int size) {
    constexpr int AT_ONCE = 8;
    int slices = (size + 256 * AT_ONCE - 1) / (256 * AT_ONCE);
    for (int work = blockIdx.x; work < number * slices; work += gridDim.x) {
        int block = work / slices, first = work % slices * 256 * AT_ONCE + threadIdx.x;
        const uint4* in = source + from[block] * size;
        uint4* out = target + to[block] * size;
        uint4 pieces[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++)
            if (first + 256 * i < size) pieces[i] = __ldcg(in + first + 256 * i);
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++)
            if (first + 256 * i < size) out[first + 256 * i] = pieces[i];
    }
}
