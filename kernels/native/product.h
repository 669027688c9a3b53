// The product of float activations and packed codes on a CPU, as an XLA FFI handler.
//
// Codes are bytes at most, so activations are made integers too, of 16 or 24 bits within a block of at most 256 rows
// (about as exact as bfloat16 and float32 are), in signed digits of 8 bits: every product is then one of the
// instructions for 8-bit products, whose sums are exact. Each digit's sum is scaled once per block.
//
//   y[n] = sum over blocks of s[n] * t * (sum over digits p of 256^p * (sum over k of (c[k,n] - z[n]) * d[p,k]))
//
// Codes are read in the canonical order (awq_jax/pack.py): a word holds rows of one column, a vector neighbouring
// columns, and one mask makes bytes of it whose rows are the bytes of a broadcast word of digits. Columns are spread
// over threads, and a column's sum is always formed in the same order.
#pragma once
#include "vectors.h"

namespace {

constexpr int64_t AHEAD = 256;      // columns that are fetched before they are needed: each row of words is one stream
constexpr int64_t WIDTH = 8192;     // columns times rows whose sums, with a block's codes, stay in a core's cache
constexpr int64_t SMALL = 2000000;  // up to so many products other threads cost more than they help
constexpr int64_t FEW = 20000;      // so many activations are made integers by one thread
constexpr int BLOCK = 256;  // rows at most: sums of digits times zero points stay within 16 bits times two
constexpr int MOST_WORDS = 80;  // of a block and column

template <int BITS> struct Period {  // after so many codes a stream of bits is at the start of a word again
  static constexpr int WORDS = BITS == 3 ? 3 : 1, CODES = WORDS * 32 / BITS, VECTORS = CODES / 4;
  static constexpr int row(int vector, int byte) { return BITS == 3 ? 4 * vector + byte : 8 / BITS * byte + vector; }
};

struct Block {
  int64_t group, first, last;  // rows [first, last) of the activations
  int64_t word, periods;       // where its codes begin, and how much of them there is
  int64_t vectors;             // of all blocks before
  int64_t padded;              // its own vectors, and more to fill tiles
};

template <int P> struct Row {  // of activations, in one block
  float scale[P];              // of each digit's sum
  int32_t minus[P];            // the digits' sum, negative, as two halves
  float sum;                   // of the activations
};

struct Problem {
  const void* x;
  const uint32_t* q;
  const void* scales;
  const uint8_t* zeros;
  const void* offsets;
  void* y;
  float* sums;  // [m, n], y itself where that is float32
  Kind x_kind, scale_kind, offset_kind, y_kind;
  int64_t m, k, n, words, groups;
  const Block* blocks;
  int64_t count;
  int32_t* digits;
  void* rows;
  int64_t width;  // columns of a task
  int64_t height;           // rows of a task of `digits`
  int64_t padded_m, depth;  // rows of whole tiles, and vectors of codes in a tile
  void (*columns)(const Problem&, int64_t begin, int64_t end);
};

template <int BITS> inline void unpack(const Ints* words, Ints* codes) {
  Ints w = words[0];
  if constexpr (BITS == 8) {
    codes[0] = w;
  } else if constexpr (BITS == 4) {
    Ints mask = all(0x0f0f0f0f);
    codes[0] = both(w, mask), codes[1] = both(right<4>(w), mask);
  } else if constexpr (BITS == 2) {
    Ints mask = all(0x03030303);
    codes[0] = both(w, mask), codes[1] = both(right<2>(w), mask);
    codes[2] = both(right<4>(w), mask), codes[3] = both(right<6>(w), mask);
  } else {  // twelve bits at a time, spread over four bytes
    Ints v = words[1], u = words[2];
    Ints four[8] = {w, right<12>(w), either(right<24>(w), left<8>(v)), right<4>(v), right<16>(v),
                    either(right<28>(v), left<4>(u)), right<8>(u), right<20>(u)};
    for (int i = 0; i < 8; i++) {
      Ints c = both(four[i], all(0xfff));
      c = both(either(c, left<10>(c)), all(0x003f003f));
      codes[i] = both(either(c, left<5>(c)), all(0x07070707));
    }
  }
}

// Some columns of one block, a multiple of LANES: of the arrays of a problem, or copied out of them.
struct Part {
  const uint32_t* q;
  const void* scales;
  const uint8_t* zeros;
  const void* offsets;
  float* y;
  size_t stride, y_stride, columns;
  Kind scale_kind, offset_kind;
};

// Its columns times R rows: y[r] += s * ... (+ o * sum).
template <int BITS, int P, int R>
__attribute__((noinline)) void product(const Part& t, int64_t periods, const int32_t* digits, const Row<P>* rows) {
  constexpr int V = Period<BITS>::VECTORS, W = Period<BITS>::WORDS;
  for (size_t j = 0; j < t.columns; j += LANES) {
    Ints zeros = t.zeros ? bytes_to_ints(t.zeros + j) : all(1 << (BITS - 1)), sum[R][P];
    if (SIGNED_CODES && BITS == 8) zeros = both(plus(zeros, all(0xff80)), all(0xffff));  // less 128, as the codes
    zeros = either(zeros, left<16>(zeros));
    UNROLL for (int r = 0; r < R; r++)
      UNROLL for (int p = 0; p < P; p++) sum[r][p] = start(zeros, rows[r].minus[p]);
    const uint32_t* q = t.q + j;
    const int32_t* x = digits;
    const auto products = [&](auto add, Ints(&to)[R][P]) __attribute__((always_inline)) {  // of one period
      Ints words[W], codes[V];
      UNROLL for (int w = 0; w < W; w++) words[w] = load(q + w * t.stride);
      unpack<BITS>(words, codes);
      UNROLL for (int w = 0; w < W; w++) __builtin_prefetch(q + w * t.stride + AHEAD);
      UNROLL for (int v = 0; v < V; v++)
        UNROLL for (int p = 0; p < P; p++)
          UNROLL for (int r = 0; r < R; r++) to[r][p] = add(to[r][p], codes[v], x[(v * P + p) * R + r]);
      q += W * t.stride, x += V * P * R;
    };
    int64_t i = 0;
#if defined(SHORT_SUMS)
    if constexpr (TOGETHER<BITS> > 0 && (BITS != 3 || R > 2)) {  // 3 bits and few rows: unpacking takes most registers
      for (int64_t end; i < periods; i = end) {
        end = i + TOGETHER<BITS> / V < periods ? i + TOGETHER<BITS> / V : periods;
        Ints part[R][P];
        UNROLL for (int r = 0; r < R; r++)
          UNROLL for (int p = 0; p < P; p++) part[r][p] = all(0);
        for (; i < end; i++) products(dot_short, part);
        UNROLL for (int r = 0; r < R; r++)
          UNROLL for (int p = 0; p < P; p++) sum[r][p] = widened(sum[r][p], part[r][p]);
      }
    }
#endif
    for (; i < periods; i++) products(dot<BITS>, sum);
    const Floats s = load(t.scales, t.scale_kind, j);
    Floats o = fill(0);
    if (t.offsets) o = fma(s, fill(1 << (BITS - 1)), load(t.offsets, t.offset_kind, j));
    UNROLL for (int r = 0; r < R; r++) {
      float* y = t.y + r * t.y_stride + j;
      Floats f = times(floats(sum[r][P - 1]), fill(rows[r].scale[P - 1]));
      UNROLL for (int p = P - 2; p >= 0; p--) f = fma(floats(sum[r][p]), fill(rows[r].scale[p]), f);
      f = fma(f, s, load(y));
      if (t.offsets) f = fma(o, fill(rows[r].sum), f);
      store(y, f);
    }
  }
}

template <int BITS, int P> void all_rows(Part t, int64_t m, int64_t periods, const int32_t* x, const Row<P>* rows) {
  for (int64_t r = 0, count; r < m; r += count) {
    count = m - r < MOST_ROWS ? m - r : MOST_ROWS;
    switch (count) {
      case 1: product<BITS, P, 1>(t, periods, x, rows + r); break;
      case 2: product<BITS, P, 2>(t, periods, x, rows + r); break;
      case 3: product<BITS, P, MOST_ROWS < 3 ? 1 : 3>(t, periods, x, rows + r); break;
      case 4: product<BITS, P, MOST_ROWS < 4 ? 1 : 4>(t, periods, x, rows + r); break;
    }
    x += periods * Period<BITS>::VECTORS * P * count, t.y += t.y_stride * count;
  }
}

// Sums of some columns as the result's floats.
void rounded(const Problem& t, int64_t begin, int64_t end) {
  if (t.y_kind == Kind::F32) return;
  for (int64_t r = 0; r < t.m; r++) {
    const float* from = t.sums + r * t.n;
    uint16_t* to = (uint16_t*)t.y + r * t.n;
    if (t.y_kind == Kind::BF16)
      for (int64_t j = begin; j < end; j++) to[j] = to_bf16(from[j]);
    else
      for (int64_t j = begin; j < end; j++) to[j] = to_f16(from[j]);
  }
}

template <int BITS, int P> void columns(const Problem& t, int64_t begin, int64_t end) {
  using Codes = Period<BITS>;
  const int64_t s_size = t.scale_kind == Kind::F32 ? 4 : 2, o_size = t.offset_kind == Kind::F32 ? 4 : 2;
  for (int64_t r = 0; r < t.m; r++) memset(t.sums + r * t.n + begin, 0, (end - begin) * 4);
  for (const Block* b = t.blocks; b < t.blocks + t.count; b++) {
    const Row<P>* rows = (const Row<P>*)t.rows + (b - t.blocks) * t.m;
    const int32_t* x = t.digits + b->vectors * P * t.m;
    const int64_t used = b->periods * Codes::WORDS;
    const bool cut = b->word + used > t.words;  // of 3 bits: the last period lacks words
    const int64_t whole = cut ? begin : begin + (end - begin) / LANES * LANES, table = b->group * t.n;
    auto from = [&](int64_t j) {
      const char *s = (const char*)t.scales + (table + j) * s_size, *o = (const char*)t.offsets;
      return Part{t.q + b->word * t.n + j, s, t.zeros ? t.zeros + table + j : nullptr, o ? o + (table + j) * o_size : nullptr,
                  t.sums + j, (size_t)t.n, (size_t)t.n, (size_t)(whole - j), t.scale_kind, t.offset_kind};
    };
    if (whole > begin) all_rows<BITS, P>(from(begin), t.m, b->periods, x, rows);
    for (int64_t j = whole; j < end; j += LANES) {  // through copies with zeros beyond the end
      const int64_t many = end - j < LANES ? end - j : LANES;
      alignas(64) uint32_t words[MOST_WORDS * LANES] = {};
      alignas(64) float s[LANES] = {}, o[LANES] = {};
      alignas(64) uint8_t z[LANES] = {};
      Part own = from(j);
      for (int64_t w = 0; w < used && b->word + w < t.words; w++) memcpy(words + w * LANES, own.q + w * t.n, many * 4);
      for (int64_t i = 0; i < many; i++) {
        s[i] = scalar(own.scales, t.scale_kind, i);
        if (own.offsets) o[i] = scalar(own.offsets, t.offset_kind, i);
        if (own.zeros) z[i] = own.zeros[i];
      }
      for (int64_t r = 0, count; r < t.m; r += count) {
        count = t.m - r < MOST_ROWS ? t.m - r : MOST_ROWS;
        alignas(64) float y[MOST_ROWS * LANES] = {};
        for (int64_t i = 0; i < count; i++) memcpy(y + i * LANES, own.y + (r + i) * t.n, many * 4);
        all_rows<BITS, P>(Part{words, s, own.zeros ? z : nullptr, own.offsets ? o : nullptr, y, LANES, LANES, LANES, Kind::F32,
                               Kind::F32}, count, b->periods, x + b->periods * Codes::VECTORS * P * r, rows + r);
        for (int64_t i = 0; i < count; i++) memcpy(own.y + (r + i) * t.n, y + i * LANES, many * 4);
      }
    }
  }
  rounded(t, begin, end);
}

// Digits of the activations of one block and row: `count` periods from row `base`, of which [first, last) count.
template <int BITS, int P>
void digits(const Problem& t, const Block& b, int64_t r, int32_t* out, int64_t step, Row<P>* row) {
  using Codes = Period<BITS>;
  constexpr float MOST = P == 3 ? 8355000.f : 32600.f;  // below 127 in every digit, however it is rounded
  alignas(64) float x[BLOCK + 2 * Codes::CODES];
  alignas(64) int32_t v[BLOCK + 2 * Codes::CODES];
  alignas(64) uint8_t d[P][BLOCK + 2 * Codes::CODES];
  const int64_t length = b.periods * Codes::CODES, base = b.word / Codes::WORDS * Codes::CODES, many = b.last - b.first;
  memset(x, 0, length * 4);
  float* own = x + (b.first - base);
  const int64_t from = r * t.k + b.first;
  if (t.x_kind == Kind::F32)
    memcpy(own, (const float*)t.x + from, many * 4);
  else if (t.x_kind == Kind::BF16)
    for (int64_t i = 0; i < many; i++) own[i] = from_bf16(((const uint16_t*)t.x)[from + i]);
  else
    for (int64_t i = 0; i < many; i++) own[i] = from_f16(((const uint16_t*)t.x)[from + i]);
  memcpy(v, x, length * 4);
  int32_t top = 0;  // of bits without the sign: larger than any number's if it is inf or NaN
  for (int64_t i = 0; i < length; i++) {
    int32_t a = v[i] & 0x7fffffff;
    top = a > top ? a : top;
  }
  float largest;
  memcpy(&largest, &top, 4);
  float scale = largest / MOST, inverse = largest > 1e-30f ? MOST / largest : 0;
  if (top >= 0x7f800000) scale = largest - largest, inverse = 0;  // NaN, and so is what comes of it
  for (int64_t i = 0; i < length; i++) v[i] = (int32_t)__builtin_rintf(x[i] * inverse);
  float total = 0;
  for (int p = 0; p < P; p++) {
    int32_t sum = 0;
    for (int64_t i = 0; i < length; i++) {
      int32_t low = (int8_t)v[i];
      sum += low;
      d[p][i] = (uint8_t)low;
      v[i] = (v[i] - low) >> 8;
    }
    row->scale[p] = scale;
    row->minus[p] = (int32_t)((uint32_t)(uint16_t)(-sum >> 1) | (uint32_t)(-sum - (-sum >> 1)) << 16);
    total += scale * (float)sum;
    scale *= 256;
    for (int64_t i = 0; i < b.periods; i++)
      for (int c = 0; c < Codes::VECTORS; c++) {
        const uint8_t* four = d[p] + i * Codes::CODES;
        uint32_t word = four[Codes::row(c, 0)] | (uint32_t)four[Codes::row(c, 1)] << 8 |
                        (uint32_t)four[Codes::row(c, 2)] << 16 | (uint32_t)four[Codes::row(c, 3)] << 24;
        out[((i * Codes::VECTORS + c) * P + p) * step] = (int32_t)word;
      }
  }
  row->sum = total;
}

}  // namespace
