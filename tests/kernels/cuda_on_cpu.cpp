// Runs one block of short_attention.cu on the CPU: every thread is a fiber, and what warps and warpgroups do together is done when
// all of them have come to it. Copies to shared memory land when they are waited for, and what is read before that is NaN.
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define EMULATED
#define DEVICE static inline
#define __global__
#define __launch_bounds__(threads, blocks)
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

static const int FIBERS = 384;
struct Index { unsigned x; };
static Index threadIdx, blockIdx, gridDim;
alignas(256) static unsigned char memory[SHARED];
static ucontext_t fibers[FIBERS], scheduler;
static std::vector<char> stacks[FIBERS];
static bool done[FIBERS];

static void fail(const char* what, long long at) {
  fprintf(stderr, "%s %lld, thread %u\n", what, at, threadIdx.x);
  abort();
}

static void yield() {
  unsigned me = threadIdx.x;
  swapcontext(&fibers[me], &scheduler);
  threadIdx.x = me;
}

// what `count` threads do once all have arrived; `wait`: whether they stay for it
struct Meeting {
  int arrived = 0, number = 0;
  template <class Work> void operator()(int count, Work work, bool wait = true) {
    int mine = number;
    if (++arrived == count) {
      arrived = 0;
      work();
      number++;
    } else if (wait) {
      while (number == mine) yield();
    }
  }
};
static Meeting block, named[16], of_warp[FIBERS / 32], of_group[FIBERS / 128];
static void __syncthreads() { block(FIBERS, [] {}); }
template <int COUNT> static void meet(int barrier) { named[barrier](COUNT, [] {}); }
static void arrived(int barrier) { named[barrier](256, [] {}, false); }

// numbers of 16 bits
static float number(u32 bits) {
  if (IS_BF16) {
    bits <<= 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
  }
  _Float16 x;
  memcpy(&x, &bits, 2);
  return x;
}
static u32 rounded(float x) {
  u32 bits = 0;
  if (IS_BF16) {
    memcpy(&bits, &x, 4);
    return std::isfinite(x) ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : bits >> 16;
  }
  _Float16 half = x;
  memcpy(&bits, &half, 2);
  return bits;
}
static u32 packed(float low, float high) { return rounded(low) | rounded(high) << 16; }
static float low_of(u32 x) { return number(x & 0xffff); }
static float high_of(u32 x) { return number(x >> 16); }
static float power_of_2(float x) { return exp2f(x); }

// shared memory
static u32 shared_address(const void*) { return 0; }
static unsigned char* shared(u32 at, u32 size) {
  if (at % size || at + size > SHARED) fail("no such place in shared memory:", at);
  return memory + at;
}
static void store_shared(u32 at, u32 x) { memcpy(shared(at, 4), &x, 4); }
static void store_shared_f(u32 at, float x) { memcpy(shared(at, 4), &x, 4); }
static void read_shared_2f(float& a, float& b, u32 at) {
  memcpy(&a, shared(at, 8), 4);
  memcpy(&b, memory + at + 4, 4);
}
static void read_shared_4(u32* x, u32 at) { memcpy(x, shared(at, 16), 16); }
static void written() {}
template <int NUMBER> static void more_registers() {}
template <int NUMBER> static void fewer_registers() {}

// gates: how many must open them, how many are left, and how often they were open
struct Gate { short count, left; int opened; };
static Gate& gate(u32 at) { return *(Gate*)shared(at, 8); }
static void make_gate(u32 at, int count) { gate(at) = {(short)count, (short)count, 0}; }
static void open_gate(u32 at) {
  if (--gate(at).left == 0) gate(at) = {gate(at).count, gate(at).count, gate(at).opened + 1};
}
static void pass_gate(u32 at, int phase) {
  while (gate(at).opened % 2 == phase) yield();
}

// copies
struct Copy { u32 to, size; unsigned char bytes[16]; };
static std::vector<std::vector<Copy>> copies[FIBERS];
static std::vector<Copy> begun[FIBERS];
static void copy(u32 to, const void* from, bool inside, u32 size) {
  if ((uintptr_t)from % size) fail("a copy from an address that is no multiple of", size);
  Copy one = {to, size, {}};
  if (inside) memcpy(one.bytes, from, size);
  memset(shared(to, size), 0xff, size);
  begun[threadIdx.x].push_back(one);
}
static void copy16(u32 to, const void* from, bool inside) { copy(to, from, inside, 16); }
static void copy4(u32 to, const void* from, bool inside) { copy(to, from, inside, 4); }
static void copies_end() {
  copies[threadIdx.x].push_back(begun[threadIdx.x]);
  begun[threadIdx.x].clear();
}
template <int LEFT> static void copies_wait() {
  auto& mine = copies[threadIdx.x];
  for (; mine.size() > LEFT; mine.erase(mine.begin()))
    for (Copy& one : mine[0]) memcpy(memory + one.to, one.bytes, one.size);
}
static void store_global(u16* at, const u32* x) {
  if ((uintptr_t)at % 16) fail("a store to an address that is no multiple of", 16);
  memcpy(at, x, 16);
}

// exchanges in a warp
static u32 offered[FIBERS], taken[FIBERS];
static u32 exchanged_word(u32 x, int distance) {
  int me = threadIdx.x, first = me / 32 * 32;
  offered[me] = x;
  of_warp[me / 32](32, [=] {
    for (int lane = 0; lane < 32; lane++) taken[first + lane] = offered[first + (lane ^ distance)];
  });
  return taken[me];
}
static float exchanged(float x, int distance) {
  u32 bits;
  memcpy(&bits, &x, 4);
  bits = exchanged_word(bits, distance);
  memcpy(&x, &bits, 4);
  return x;
}
static int same(int x) { return x; }

// products of a warpgroup: 64 x columns sums over 16 (PTX ISA, wgmma.mma_async; operands without swizzle)
struct Operands { float* c; const u32* registers; u64 a, b; };
static Operands operands[FIBERS];
static float element(u64 matrix, bool transposed, int row, int k) {
  u32 start = (matrix & 0x3fff) << 4, leading = (matrix >> 16 & 0x3fff) << 4, stride = (matrix >> 32 & 0x3fff) << 4;
  u32 at = start + row / 8 * stride + k / 8 * leading + (transposed ? row % 8 * 2 + k % 8 * 16 : row % 8 * 16 + k % 8 * 2);
  u16 bits;
  memcpy(&bits, shared(at, 2), 2);
  return number(bits);
}
static void product(float* c, const u32* registers, u64 a, u64 b, int columns, bool a_transposed, bool b_transposed, int keep) {
  int me = threadIdx.x, group = me / 128, first = group * 128;
  operands[me] = {c, registers, a, b};
  of_group[group](128, [=] {
    static float left[64][16], right[256][16];
    for (int thread = first; thread < first + 128; thread++)
      if (operands[thread].b != b || operands[thread].a != a) fail("operands of a warpgroup differ:", thread);
    for (int row = 0; row < 64; row++)
      for (int k = 0; k < 16; k++) {
        int lane = row % 8 * 4 + k % 8 / 2;
        const u32* of = operands[first + row / 16 * 32 + lane].registers;
        u32 word = registers ? of[row % 16 / 8 + k / 8 * 2] : 0;
        left[row][k] = !registers ? element(a, a_transposed, row, k) : k % 2 ? high_of(word) : low_of(word);
      }
    for (int column = 0; column < columns; column++)
      for (int k = 0; k < 16; k++) right[column][k] = element(b, b_transposed, column, k);
    for (int thread = first; thread < first + 128; thread++)
      for (int i = 0; i < columns / 2; i++) {
        int lane = thread % 32, row = thread % 128 / 32 * 16 + lane / 4 + i % 4 / 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
        float sum = keep ? operands[thread].c[i] : 0;
        for (int k = 0; k < 16; k++) sum += left[row][k] * right[column][k];
        operands[thread].c[i] = sum;
      }
  });
}
static void product_32(float* c, u64 a, u64 b, int keep) { product(c, nullptr, a, b, 32, false, false, keep); }
static void product_heads(float* c, const u32* a, u64 b, int keep) { product(c, a, 0, b, HEAD_DIM, false, true, keep); }
static void product_queries(float* c, u64 a, u64 b, int keep) { product(c, nullptr, a, b, HEAD_DIM, true, true, keep); }
static void products_begin() {}
static void products_end() {}
template <int LEFT> static void products_wait() {}

#include SOURCE

static std::function<void()> program;
static void enter(int thread) {
  threadIdx.x = thread;
  program();
  done[thread] = true;
  swapcontext(&fibers[thread], &scheduler);
}

extern "C" void run(int blocks, const u16* q, const u16* k, const u16* v, const u16* out, const u16* grad, const float* sums,
                    u16* dq, u16* dk, u16* dv, float* partial, int total, int heads, int length) {
  program = [=] { short_attention_backward(q, k, v, out, grad, sums, dq, dk, dv, partial, total, heads, length); };
  gridDim.x = blocks;
  for (blockIdx.x = 0; (int)blockIdx.x < blocks; blockIdx.x++) {
    memset(memory, 0xff, sizeof memory);
    for (Meeting& meeting : named) meeting = Meeting();
    for (int i = 0; i < FIBERS; i++) {
      done[i] = false;
      stacks[i].resize(1 << 17);
      getcontext(&fibers[i]);
      fibers[i].uc_stack.ss_sp = stacks[i].data();
      fibers[i].uc_stack.ss_size = stacks[i].size();
      makecontext(&fibers[i], (void (*)())enter, 1, i);
    }
    for (bool some = true; some;) {
      some = false;
      for (int i = 0; i < FIBERS; i++)
        if (!done[i]) {
          some = true;
          threadIdx.x = i;
          swapcontext(&scheduler, &fibers[i]);
        }
    }
  }
}
