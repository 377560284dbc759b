// Gradients of attention in which every query sees every key of its row: rows of at most 256 places, heads of 64 or 72 columns,
// fp16 or bf16, for Hopper (sm_90a). Formulas: FlashAttention-2, arXiv:2307.08691, algorithm 2.
//
// Macros: HEAD_DIM, IS_BF16 (else fp16), EVEN (the length is 256), SCALE (of scores), and Q_TOKEN, K_TOKEN, V_TOKEN, OUT_TOKEN
// (O and dO), GRAD_TOKEN (dq, dk, dv): elements from one token to the next.
//
// A block has one (row, head) at a time and goes on to another. Two warpgroups multiply, with 128 keys each, whose gradients stay in
// their registers while steps of 32 queries go by. Scores are [keys, queries]: so weights and their gradients are, in the registers
// that they are found in, operands of the products with dO and q. For the gradients of the queries, sums over all keys, they go
// through shared memory, 64 queries at a time. A third warpgroup copies what comes next: k and v of the next head, q, dO and O of
// the next steps.
//
// A tile [rows, HEAD_DIM] lies in shared memory as HEAD_DIM / 8 chunks of 8 columns, each [rows][8] and then 16 bytes more: every
// matrix of 8 x 8 that a product takes is 128 adjacent bytes, and the pieces of a row, copied together, lie in different banks.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

#ifndef EMULATED
#define DEVICE static __device__ __forceinline__
DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
#if IS_BF16
#define KIND "bf16"
#else
#define KIND "f16"
#endif
// a step of 16 of products of a warpgroup's operands is asynchronous: registers may be touched between `products_begin` and the
// wait for them by products alone
DEVICE void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void products_end() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT> DEVICE void products_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(LEFT) : "memory"); }
// what was written to shared memory is there for products
DEVICE void written() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// barriers of warpgroups, by number; `arrived` does not wait
template <int THREADS_OF> DEVICE void meet(int barrier) { asm volatile("bar.sync %0, %1;" :: "r"(barrier), "n"(THREADS_OF) : "memory"); }
DEVICE void arrived(int barrier) { asm volatile("bar.arrive %0, 256;" :: "r"(barrier) : "memory"); }
// barriers in shared memory
DEVICE void make_gate(u32 at, int count) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(at), "r"(count) : "memory"); }
DEVICE void open_gate(u32 at) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(at) : "memory"); }
DEVICE void pass_gate(u32 at, int phase) {
  asm volatile("{.reg .pred p; AGAIN: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @p bra DONE; bra AGAIN; DONE:}" :: "r"(at), "r"(phase) : "memory");
}
template <int NUMBER> DEVICE void more_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(NUMBER)); }
template <int NUMBER> DEVICE void fewer_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(NUMBER)); }
DEVICE u32 packed(float low, float high) {
  u32 d;
  asm("cvt.rn." KIND "x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
// fp32 of both halves of a word
#if IS_BF16
DEVICE float low_of(u32 x) { return __uint_as_float(x << 16); }
DEVICE float high_of(u32 x) { return __uint_as_float(x & 0xffff0000u); }
#else
DEVICE float low_of(u32 x) { float f; asm("{.reg .b16 l,h; mov.b32 {l,h}, %1; cvt.f32.f16 %0, l;}" : "=f"(f) : "r"(x)); return f; }
DEVICE float high_of(u32 x) { float f; asm("{.reg .b16 l,h; mov.b32 {l,h}, %1; cvt.f32.f16 %0, h;}" : "=f"(f) : "r"(x)); return f; }
#endif
DEVICE float power_of_2(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
// 16 bytes (zeros if not inside) or 4 to shared memory, without waiting
DEVICE void copy16(u32 to, const void* from, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(to), "l"(from), "r"(inside ? 16 : 0));
}
DEVICE void copy4(u32 to, const void* from, bool inside) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" :: "r"(to), "l"(from), "r"(inside ? 4 : 0));
}
DEVICE void copies_end() { asm volatile("cp.async.commit_group;"); }
template <int LEFT> DEVICE void copies_wait() { asm volatile("cp.async.wait_group %0;" :: "n"(LEFT) : "memory"); }
DEVICE void store_shared(u32 at, u32 x) { asm volatile("st.shared.b32 [%0], %1;" :: "r"(at), "r"(x) : "memory"); }
DEVICE void store_shared_f(u32 at, float x) { asm volatile("st.shared.f32 [%0], %1;" :: "r"(at), "f"(x) : "memory"); }
DEVICE void read_shared_2f(float& a, float& b, u32 at) { asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];" : "=f"(a), "=f"(b) : "r"(at)); }
DEVICE void read_shared_4(u32* x, u32 at) {
  asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];" : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(at));
}
DEVICE u32 exchanged_word(u32 x, int distance) { return __shfl_xor_sync(0xffffffffu, x, distance); }
DEVICE void store_global(u16* at, const u32* x) {
  asm volatile("st.global.v4.b32 [%0], {%1,%2,%3,%4};" :: "l"(at), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]) : "memory");
}
DEVICE int same(int x) { return __shfl_sync(0xffffffffu, x, 0); }  // tells the compiler that a warp has one
DEVICE float exchanged(float x, int distance) { return __shfl_xor_sync(0xffffffffu, x, distance); }
extern __shared__ __align__(128) unsigned char memory[];
// PRODUCTS
#endif

#define LOG2_E 1.4426950408889634f
#define CHUNKS (HEAD_DIM / 8)
#define WARPS 8
// and a warpgroup that copies
#define THREADS (32 * WARPS + 128)
#define LONGEST 256
// queries of a step
#define STEP 32
#define TILE_CHUNK (LONGEST * 16 + 16)
#define TILE (CHUNKS * TILE_CHUNK)
#define STEP_CHUNK (STEP * 16 + 16)
#define STEP_TILE (CHUNKS * STEP_CHUNK)
// q, dO and O, then of each query the logarithm and delta, the sum of O dO
#define STAGE (3 * STEP_TILE + 2 * STEP * 4)
#define STAGES 3
#define D_SCORES (2 * STEP / 8 * TILE_CHUNK)

// 32 rows of a head to shared memory, by a warp: 4 rows of 8 chunks at a time, 128 adjacent bytes for 8 lanes on both sides, then
// of all rows the chunk that is left. Strides are constants, so that a thread needs one address.
template <int TOKEN> DEVICE void copy_rows(u32 to, u32 chunk, const u16* from, int first, int length) {
  int lane = threadIdx.x % 32;
  from += lane / 8 * TOKEN + lane % 8 * 8;
  u32 at = to + lane % 8 * chunk + lane / 8 * 16;
#pragma unroll
  for (int row = 0; row < 32; row += 4) copy16(at + row * 16, from + row * TOKEN, EVEN || first + row + lane / 8 < length);
  if (CHUNKS > 8)
    copy16(to + 8 * chunk + lane * 16, from + (lane - lane / 8) * TOKEN + (8 - lane % 8) * 8, EVEN || first + lane < length);
}

// Where an operand of a product lies (PTX: matrix descriptor, no swizzle): in 8 x 8 matrices of 128 adjacent bytes.
DEVICE u64 matrices(u32 at, u32 leading, u32 stride) {
  return (u64)(at >> 4) | (u64)(leading >> 4) << 16 | (u64)(stride >> 4) << 32;
}
// 16 columns of a tile's rows, as what is summed over: columns 16 k ..; behind the last chunk lie zeros
DEVICE u64 columns(u32 at, u32 chunk, int k, u32 zeros) {
  u32 first = at + 2 * k * chunk;
  return matrices(first, 2 * k + 1 < CHUNKS ? chunk : zeros - first, 128);
}
// 16 rows of a tile, as what is summed over
DEVICE u64 rows(u32 at, u32 chunk) { return matrices(at, 128, chunk); }

// 64 rows of a head from the registers c of a product of a warpgroup, times a factor. Four lanes have 8
// adjacent columns; they exchange them, so that each has 16 bytes of one of four chunks.
DEVICE void store_rows(u16* to, int first, int length, const float* c, float factor) {
  int lane = threadIdx.x % 32, t = lane % 4;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    int place = first + half * 8 + lane / 4;
    u16* row = to + (long long)place * GRAD_TOKEN;
    bool inside = EVEN || place < length;
#pragma unroll
    for (int n = 0; n + 4 <= CHUNKS; n += 4) {
      u32 x[4];
#pragma unroll
      for (int i = 0; i < 4; i++) x[i] = packed(c[4 * (n + i) + 2 * half] * factor, c[4 * (n + i) + 2 * half + 1] * factor);
      // a transposition of 4 x 4: of pairs of chunks by the lane beside, then by the one beyond
      u32 a = exchanged_word(t & 1 ? x[0] : x[1], 1), b = exchanged_word(t & 1 ? x[2] : x[3], 1);
      if (t & 1) x[0] = a, x[2] = b; else x[1] = a, x[3] = b;
      a = exchanged_word(t & 2 ? x[0] : x[2], 2), b = exchanged_word(t & 2 ? x[1] : x[3], 2);
      if (t & 2) x[0] = a, x[1] = b; else x[2] = a, x[3] = b;
      if (inside) store_global(row + (n + t) * 8, x);
    }
#pragma unroll
    for (int n = CHUNKS / 4 * 4; n < CHUNKS; n++)
      if (inside) *(u32*)(row + n * 8 + t * 2) = packed(c[4 * n + 2 * half] * factor, c[4 * n + 2 * half + 1] * factor);
  }
}

// Of 2 KEPT numbers, each summed over this lane and the one at a distance, this keeps the first or the second half.
template <int KEPT> DEVICE void add_half(float* x) {
  bool upper = threadIdx.x & 2 * KEPT;
#pragma unroll
  for (int j = 0; j < KEPT; j++) {
    float given = exchanged(upper ? x[j] : x[j + KEPT], 2 * KEPT);
    x[j] = (upper ? x[j + KEPT] : x[j]) + given;
  }
}
// To a lane's `totals`, sums over the 64 rows of the registers c of a product: of a warp's 16, over the 8 lanes that have the same
// columns. In three exchanges each keeps half of its columns, and in the end the two of chunk lane / 4; of the last chunk one.
DEVICE void add_columns(float* totals, const float* c) {
  int lane = threadIdx.x % 32;
  float x[16];
#pragma unroll
  for (int j = 0; j < 16; j++) x[j] = c[4 * (j / 2) + j % 2] + c[4 * (j / 2) + 2 + j % 2];
  add_half<8>(x);
  add_half<4>(x);
  add_half<2>(x);
  totals[0] += x[0];
  totals[1] += x[1];
  if (CHUNKS > 8) {
    float a = c[HEAD_DIM / 2 - 4] + c[HEAD_DIM / 2 - 2], b = c[HEAD_DIM / 2 - 3] + c[HEAD_DIM / 2 - 1];
    float given = exchanged(lane & 16 ? a : b, 16);
    a = (lane & 16 ? b : a) + given;
    a += exchanged(a, 4);
    totals[2] += a + exchanged(a, 8);
  }
}
DEVICE void store_columns(float* to, const float* totals, float factor) {
  int lane = threadIdx.x % 32;
  to[lane * 2] = totals[0] * factor;
  to[lane * 2 + 1] = totals[1] * factor;
  if (CHUNKS > 8 && lane / 4 % 4 == 0) to[64 + lane % 4 * 2 + lane / 16] = totals[2] * factor;
}

// sums [total rows and heads, length]: of a query, the natural logarithm of the sum of the exponentials of its scores.
// partial, if it is there [rows, WARPS, heads, 2, HEAD_DIM]: sums of dq and of dv over the places that a warp had.
extern "C" __global__ void __launch_bounds__(THREADS, 1) short_attention_backward(
    const u16* q, const u16* k, const u16* v, const u16* out, const u16* grad, const float* sums, u16* dq, u16* dk, u16* dv,
    float* partial, int total, int heads, int length) {
  int warp = same(threadIdx.x / 32), lane = threadIdx.x % 32;
  u32 shared = shared_address(memory), ring = shared + 4 * TILE, scores = ring + STAGES * STAGE, zeros = scores + D_SCORES;
  u32 full = zeros + 64 * 16, empty = full + STAGES * 8, keys_empty = empty + STAGES * 8;
  const int steps = EVEN ? LONGEST / STEP : (length + 2 * STEP - 1) / (2 * STEP) * 2;  // pairs
  int my_heads = total > (int)blockIdx.x ? (total - 1 - (int)blockIdx.x) / (int)gridDim.x + 1 : 0;
  const float to_two = SCALE * LOG2_E;
  if (my_heads == 0) return;
  if (threadIdx.x < STAGES) {
    make_gate(full + threadIdx.x * 8, 128);
    make_gate(empty + threadIdx.x * 8, WARPS);
  }
  if (threadIdx.x < 2) make_gate(keys_empty + threadIdx.x * 8, WARPS);
  for (int at = threadIdx.x; at < 64 * 4; at += THREADS) store_shared(zeros + at * 4, 0);
  written();
  __syncthreads();

  if (warp >= WARPS) {
    fewer_registers<40>();
    int mine = warp % 4;
    auto start_keys = [&](int number, int from, int to) {  // of a head: of each of 4 parts 32 rows of k or v
      int head = blockIdx.x + number * gridDim.x;
      long long tokens = (long long)(head / heads) * length, columns = head % heads * HEAD_DIM;
      u32 tiles = shared + number % 2 * 2 * TILE + mine * 512;
#pragma unroll 1
      for (int part = from; part < to && part < 4; part++) {
        int rows = part % 2 * 128, first = rows + mine * 32;
        if (part < 2)
          copy_rows<K_TOKEN>(tiles + rows * 16, TILE_CHUNK, k + (tokens + first) * K_TOKEN + columns, first, length);
        else
          copy_rows<V_TOKEN>(tiles + TILE + rows * 16, TILE_CHUNK, v + (tokens + first) * V_TOKEN + columns, first, length);
      }
    };
    auto finish = [&](int number) {  // a step's copies are there: find delta
      meet<128>(1);
      u32 stage = ring + number % STAGES * STAGE;
      float sum = 0;
      int row = mine * 8 + lane % 8, c = lane / 8;
#pragma unroll
      for (int n = 0; n < CHUNKS; n += 4)
        if (n + c < CHUNKS) {
          u32 x[4], y[4];
          read_shared_4(x, stage + STEP_TILE + (n + c) * STEP_CHUNK + row * 16);
          read_shared_4(y, stage + 2 * STEP_TILE + (n + c) * STEP_CHUNK + row * 16);
#pragma unroll
          for (int i = 0; i < 4; i++) sum += low_of(x[i]) * low_of(y[i]) + high_of(x[i]) * high_of(y[i]);
        }
      sum += exchanged(sum, 8);
      sum += exchanged(sum, 16);
      if (c == 0) store_shared_f(stage + 3 * STEP_TILE + STEP * 4 + row * 4, sum);
      written();
      open_gate(full + number % STAGES * 8);
    };
    const int share = (4 + steps - 3) / (steps - 2);
    start_keys(0, 0, 4);
    int number = 0;
#pragma unroll 1
    for (int head_number = 0; head_number < my_heads; head_number++) {
      int head = blockIdx.x + head_number * gridDim.x;
      long long tokens = (long long)(head / heads) * length, columns = head % heads * HEAD_DIM;
#pragma unroll 1
      for (int step = 0; step < steps; step++, number++) {
        if (number >= STAGES) pass_gate(empty + number % STAGES * 8, number / STAGES % 2 ^ 1);
        u32 to = ring + number % STAGES * STAGE;
        int first = step * STEP;
        // a tensor for each of the first three warps
        if (mine == 0) {
          copy_rows<Q_TOKEN>(to, STEP_CHUNK, q + (tokens + first) * Q_TOKEN + columns, first, length);
        } else if (mine < 3) {
          const u16* from = (mine == 1 ? grad : out) + (tokens + first) * OUT_TOKEN + columns;
          copy_rows<OUT_TOKEN>(to + mine * STEP_TILE, STEP_CHUNK, from, first, length);
        } else {
          bool there = EVEN || first + lane < length;
          copy4(to + 3 * STEP_TILE + lane * 4, sums + (long long)head * length + (there ? first + lane : 0), there);
        }
        if (step >= 2 && head_number + 1 < my_heads) {
          if (step == 2 && head_number > 0) pass_gate(keys_empty + (head_number + 1) % 2 * 8, (head_number + 1) / 2 % 2 ^ 1);
          start_keys(head_number + 1, (step - 2) * share, (step - 1) * share);
        }
        copies_end();
        if (number > 0) {
          copies_wait<1>();
          finish(number - 1);
        }
      }
    }
    copies_wait<0>();
    finish(number - 1);
    return;
  }

  more_registers<232>();
  int group = warp / 4;
  // the first of a thread's rows of 8 of a tile of 64 keys
  auto key_of = [&](int m, int half) { return group * 128 + m * 64 + warp % 4 * 16 + half * 8 + lane / 4; };
  auto queries = [&](int pair, float* totals) {  // gradients of the queries of two steps, by one warpgroup
    int head_number = 2 * pair / steps, head = blockIdx.x + head_number * gridDim.x;
    u32 keys = shared + head_number % 2 * 2 * TILE;
    float c[HEAD_DIM / 2];
    products_begin();
#pragma unroll
    for (int k = 0; k < LONGEST / 16; k++) product_queries(c, rows(scores + k * 256, TILE_CHUNK), rows(keys + k * 256, TILE_CHUNK), k > 0);
    products_end();
    products_wait<0>();
    u16* to = dq + (long long)(head / heads) * length * GRAD_TOKEN + head % heads * HEAD_DIM;
    store_rows(to, 2 * pair % steps * STEP + warp % 4 * 16, length, c, SCALE);
    if (partial) add_columns(totals, c);
  };

  int number = 0;
#pragma unroll 1
  for (int head_number = 0; head_number < my_heads; head_number++) {
    float d_keys[2][HEAD_DIM / 2] = {}, d_values[2][HEAD_DIM / 2] = {}, total_queries[3] = {};
    u32 keys = shared + head_number % 2 * 2 * TILE;
#pragma unroll 1
    for (int step = 0; step < steps; step++, number++) {
      pass_gate(full + number % STAGES * 8, number / STAGES % 2);
      u32 stage = ring + number % STAGES * STAGE;
      u32 to = scores + number % 2 * 4 * TILE_CHUNK, mine = keys + group * 128 * 16;
      float s[2][16], p[2][16];
      u32 x[2][4][2], y[2][4][2];
      auto find_scores = [&](int m) {
#pragma unroll
        for (int k = 0; k < (CHUNKS + 1) / 2; k++)
          product_32(s[m], columns(mine + m * 1024, TILE_CHUNK, k, zeros), columns(stage, STEP_CHUNK, k, zeros), k > 0);
        products_end();
      };
      auto find_d_weights = [&](int m) {
#pragma unroll
        for (int k = 0; k < (CHUNKS + 1) / 2; k++)
          product_32(p[m], columns(mine + TILE + m * 1024, TILE_CHUNK, k, zeros), columns(stage + STEP_TILE, STEP_CHUNK, k, zeros), k > 0);
        products_end();
      };
      float of_queries[4][2];  // the logarithms, then delta: read while products are under way
      auto read_queries = [&](int from) {
#pragma unroll
        for (int n = 0; n < 4; n++)
          read_shared_2f(of_queries[n][0], of_queries[n][1], stage + 3 * STEP_TILE + from * STEP * 4 + (n * 8 + lane % 4 * 2) * 4);
      };
      auto weights = [&](int m) {
#pragma unroll
        for (int n = 0; n < 4; n++) {
          float a = of_queries[n][0] * LOG2_E, b = of_queries[n][1] * LOG2_E;
#pragma unroll
          for (int half = 0; half < 2; half++) {
            float &one = s[m][4 * n + 2 * half], &two = s[m][4 * n + 2 * half + 1];
            one = power_of_2(one * to_two - a);
            two = power_of_2(two * to_two - b);
            if (!EVEN) {  // of what is not there: infinite, perhaps
              int place = step * STEP + n * 8 + lane % 4 * 2, key = key_of(m, half);
              if (place >= length || key >= length) one = 0;
              if (place + 1 >= length || key >= length) two = 0;
            }
            x[m][n][half] = packed(one, two);
          }
        }
      };
      auto d_scores = [&](int m) {
#pragma unroll
        for (int n = 0; n < 4; n++) {
          float a = of_queries[n][0], b = of_queries[n][1];
#pragma unroll
          for (int half = 0; half < 2; half++) {
            y[m][n][half] = packed(s[m][4 * n + 2 * half] * (p[m][4 * n + 2 * half] - a),
                                   s[m][4 * n + 2 * half + 1] * (p[m][4 * n + 2 * half + 1] - b));
            store_shared(to + n * TILE_CHUNK + key_of(m, half) * 16 + lane % 4 * 4, y[m][n][half]);
          }
        }
      };
      auto add_values = [&](int m) {
#pragma unroll
        for (int k = 0; k < STEP / 16; k++) product_heads(d_values[m], &x[m][2 * k][0], rows(stage + STEP_TILE + k * 256, STEP_CHUNK), 1);
        products_end();
      };
      auto add_keys = [&](int m) {
#pragma unroll
        for (int k = 0; k < STEP / 16; k++) product_heads(d_keys[m], &y[m][2 * k][0], rows(stage + k * 256, STEP_CHUNK), 1);
        products_end();
      };
      // products go on while weights and their gradients are computed
      products_begin();
      find_scores(0);
      find_scores(1);
      find_d_weights(0);
      read_queries(0);
      products_wait<2>();
      weights(0);
      products_begin();
      add_values(0);
      products_wait<2>();
      weights(1);
      read_queries(1);
      products_wait<1>();
      if (number % 2 == 0 && number > 0 && number / 2 % 2 == group) meet<256>(4 + group);  // the other has read the last scores
      d_scores(0);
      products_begin();
      find_d_weights(1);
      add_keys(0);
      add_values(1);
      products_wait<2>();
      d_scores(1);
      products_begin();
      add_keys(1);
      written();
      products_wait<0>();
      if (lane == 0) open_gate(empty + number % STAGES * 8);
      if (number % 2 == 1) {  // by turns, one takes the queries' gradients when the other has written, too
        int pair = number / 2;
        if (pair % 2 == group) {
          meet<256>(2 + group);
          queries(pair, total_queries);
          arrived(4 + (group ^ 1));
        } else {
          arrived(2 + (group ^ 1));
        }
      }
    }
    if (lane == 0) open_gate(keys_empty + head_number % 2 * 8);
    int head = blockIdx.x + head_number * gridDim.x;
    long long at = (long long)(head / heads) * length * GRAD_TOKEN + head % heads * HEAD_DIM;
#pragma unroll
    for (int m = 0; m < 2; m++) {
      int row = key_of(m, 0) - lane / 4;
      store_rows(dk + at, row, length, d_keys[m], SCALE);
      store_rows(dv + at, row, length, d_values[m], 1.0f);
    }
    if (partial) {
      float total_values[3] = {};
      add_columns(total_values, d_values[0]);
      add_columns(total_values, d_values[1]);
      float* to = partial + ((long long)(head / heads * WARPS + warp) * heads + head % heads) * 2 * HEAD_DIM;
      store_columns(to, total_queries, SCALE);
      store_columns(to + HEAD_DIM, total_values, 1.0f);
    }
  }
}
