// Runs CUDA kernels on the CPU: a thread of a block is a fiber, and blocks run one after the other. Enough of CUDA for
// kernels.cu: barriers, shuffles, atomics. Fibers of a warp wait for each other at shuffles, as threads of a warp do.
#pragma once
#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <ucontext.h>
#include <vector>

#define EMULATED 1
#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
using std::max;
using std::min;

struct dim3 { unsigned x = 1, y = 1, z = 1; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

template <typename T> T __ldcs(const T* p) { return *p; }
template <typename T> T __ldcg(const T* p) { return *p; }
inline float __uint_as_float(unsigned v) { float f; memcpy(&f, &v, 4); return f; }
inline unsigned __float_as_uint(float f) { unsigned v; memcpy(&v, &f, 4); return v; }
inline void __threadfence() {}
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline int min(int a, unsigned b) { return std::min(a, (int)b); }
template <typename T> T atomicAdd(T* p, T v) { T old = *p; *p += v; return old; }
template <typename T> T atomicMax(T* p, T v) { T old = *p; *p = std::max(old, v); return old; }
template <typename T> T atomicExch(T* p, T v) { T old = *p; *p = v; return old; }
inline void wait_for_input() {}
inline void let_next_start() {}

struct Fiber { ucontext_t context; jmp_buf at; bool begun = false, done = false; std::vector<char> stack; };
struct Barrier { int arrived = 0; long round = 0; };
inline std::vector<Fiber> fibers;
inline std::vector<Barrier> warps;
inline Barrier block_barrier;
inline int current, alive;
inline std::vector<int> alive_in_warp;
inline uint64_t exchanged[64][2][32];  // by turns, so that nobody writes over what another has not read yet
inline jmp_buf scheduler;
inline std::function<void()> body;

inline void give_way() {
    if (_setjmp(fibers[current].at) == 0) _longjmp(scheduler, 1);
}
inline void arrive(Barrier& barrier, const int& members) {
    long round = barrier.round;
    barrier.arrived++;
    while (barrier.round == round) {
        if (barrier.arrived >= members) barrier.arrived = 0, barrier.round++;
        else give_way();
    }
}
inline void __syncthreads() { arrive(block_barrier, alive); }
inline void __syncwarp() { arrive(warps[current / 32], alive_in_warp[current / 32]); }
template <typename T> T __shfl_xor_sync(unsigned, T value, int mask) {
    int warp = current / 32, lane = current % 32, turn = warps[warp].round & 1;
    memcpy(&exchanged[warp][turn][lane], &value, sizeof(T));
    __syncwarp();
    T other;
    memcpy(&other, &exchanged[warp][turn][lane ^ mask], sizeof(T));
    return other;
}

inline float bf16_at(unsigned pair, int high) { return __uint_as_float(high ? pair & 0xffff0000u : pair << 16); }
// mma.m16n8k16: lane 4g + t holds rows g and g + 8 of A and of the result, column g of B, columns 2t and 2t + 1 of the result
inline void multiply_add(float* c, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
    static unsigned shared[64][32][6];
    int warp = current / 32, lane = current % 32;
    unsigned mine[6] = {a0, a1, a2, a3, b0, b1};
    memcpy(shared[warp][lane], mine, sizeof mine);
    __syncwarp();
    for (int i = 0; i < 4; i++) {
        int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 16; k++) {
            unsigned* a = shared[warp][row % 8 * 4 + k % 8 / 2];
            unsigned* b = shared[warp][column * 4 + k % 8 / 2];
            c[i] += bf16_at(a[row / 8 + k / 8 * 2], k % 2) * bf16_at(b[4 + k / 8], k % 2);
        }
    }
    __syncwarp();
}

inline void run_fiber() {
    body();
    fibers[current].done = true;
    alive--;
    alive_in_warp[current / 32]--;
    _longjmp(scheduler, 1);
}

inline void launch(unsigned x, unsigned y, unsigned z, unsigned threads, std::function<void()> kernel) {
    gridDim = {x, y, z};
    blockDim = {threads, 1, 1};
    body = std::move(kernel);
    if (fibers.size() < threads) fibers.resize(threads);
    for (unsigned b = 0; b < x * y * z; b++) {
        blockIdx = {b % x, b / x % y, b / x / y};
        alive = (int)threads;
        warps.assign((threads + 31) / 32, Barrier());
        alive_in_warp.assign((threads + 31) / 32, 32);
        block_barrier = Barrier();
        for (unsigned t = 0; t < threads; t++) fibers[t].begun = fibers[t].done = false;
        while (alive > 0)
            for (unsigned t = 0; t < threads; t++) {
                Fiber& fiber = fibers[t];
                if (fiber.done) continue;
                current = (int)t;
                threadIdx = {t, 0, 0};
                if (_setjmp(scheduler) != 0) continue;
                if (fiber.begun) _longjmp(fiber.at, 1);
                fiber.begun = true;
                if (fiber.stack.empty()) fiber.stack.resize(128 << 10);
                getcontext(&fiber.context);
                fiber.context.uc_stack.ss_sp = fiber.stack.data();
                fiber.context.uc_stack.ss_size = fiber.stack.size();
                fiber.context.uc_link = nullptr;
                makecontext(&fiber.context, run_fiber, 0);
                setcontext(&fiber.context);
            }
    }
}
