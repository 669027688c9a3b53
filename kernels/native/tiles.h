// The product of product.h on AMX: 16 rows times 16 columns times 64 codes in one instruction.
//
// Codes less their zero points are signed bytes, unpacked once for all rows into what a tile holds: a row of the tile is
// four codes of each of 16 columns, which is what `unpack` makes. Digits lie by row, so that a tile of them is loaded as
// it lies. The digits' sums of a block, which are exact, are added with their weights, scaled once, and added to sums of
// floats that stay in registers from block to block.
#pragma once
#include "product.h"

#if defined(__AMX_INT8__)
#include <sys/syscall.h>
#include <unistd.h>

namespace {

constexpr int64_t TILE = 16;              // rows, and columns
constexpr int64_t CODES_AT_ONCE = 32768;  // bytes of unpacked codes: within the first-level cache, or nearly
constexpr int64_t DIGITS_AT_ONCE = 1 << 20;  // bytes of digits that all columns meet before more rows are begun
constexpr int64_t LEAST_ROWS = 5;            // fewer are multiplied vector by vector

// Whether the system lets this process use tiles; it is asked once.
bool tiles_allowed() {
  static const bool allowed = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
  return allowed;
}

// What was stored before is in memory: GCC does not know that the instructions of tiles read it.
inline void in_memory(const void* p) { asm volatile("" : : "r"(p) : "memory"); }

void configure(int64_t depth) {  // tiles 0..2: sums; 3: codes; 4..6: digits; `depth` groups of four codes
  alignas(64) uint8_t c[64] = {1};
  uint16_t* bytes = (uint16_t*)(c + 16);
  for (int i = 0; i < 8; i++) bytes[i] = 64, c[48 + i] = TILE;
  c[48 + 3] = (uint8_t)depth;
  for (int i = 4; i < 7; i++) bytes[i] = (uint16_t)(4 * depth);
  in_memory(c);
  _tile_loadconfig(c);
}

inline Floats load(const void* p, Kind kind, int64_t i, __mmask16 columns) {
  if (kind == Kind::F32) return _mm512_maskz_loadu_ps(columns, (const float*)p + i);
  __m256i v = _mm256_maskz_loadu_epi16(columns, (const uint16_t*)p + i);
  if (kind == Kind::F16) return _mm512_cvtph_ps(v);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}

// A block's codes of 16 columns, less their zero points (less 128 for 8 bits), as rows of tiles.
template <int BITS> void unpack_block(const Problem& t, const Block& b, int64_t j, __mmask16 columns, int8_t* out) {
  constexpr int V = Period<BITS>::VECTORS, W = Period<BITS>::WORDS;
  Ints less = all(BITS == 8 ? 128 : 1 << (BITS - 1));
  if (t.zeros && BITS < 8)
    less = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(columns, t.zeros + b.group * t.n + j));
  less = _mm512_mullo_epi32(less, all(0x01010101));
  const uint32_t* q = t.q + b.word * t.n + j;
  for (int64_t i = 0; i < b.periods; i++) {
    Ints words[W], codes[V];
    for (int w = 0; w < W; w++) {  // of 3 bits: the last period may lack words
      const int64_t at = i * W + w;
      words[w] = _mm512_maskz_loadu_epi32(b.word + at < t.words ? columns : 0, q + at * t.n);
      __builtin_prefetch(q + at * t.n + TILE);
    }
    unpack<BITS>(words, codes);
    UNROLL for (int v = 0; v < V; v++, out += 64) _mm512_store_si512(out, _mm512_sub_epi8(codes[v], less));
  }
}

// Digits of a block's activations of one row in the order of `unpack`'s bytes; beyond the block's codes there are zeros.
template <int BITS, int P> void digits_in_a_row(const Problem& t, const Block& b, int64_t r, int8_t* out, int64_t step, Row<P>* row) {
  using Codes = Period<BITS>;
  constexpr float MOST = P == 3 ? 8355000.f : 32600.f;  // see `digits`
  alignas(64) float x[BLOCK + 4 * TILE * 4];
  const int64_t base = b.word / Codes::WORDS * Codes::CODES, many = b.last - b.first;
  const int64_t length = (b.periods * Codes::CODES + 15) / 16 * 16;
  memset(x, 0, length * 4);
  float* own = x + (b.first - base);
  const int64_t from = r * t.k + b.first;
  if (t.x_kind == Kind::F32)
    memcpy(own, (const float*)t.x + from, many * 4);
  else
    for (int64_t i = 0; i < many; i += 16) {
      const __mmask16 some = many - i < 16 ? (1 << (many - i)) - 1 : 0xffff;
      _mm512_mask_storeu_ps(own + i, some, load(t.x, t.x_kind, from + i, some));
    }
  Ints top = all(0);  // of bits without the sign: larger than any number's if it is inf or NaN
  for (int64_t i = 0; i < length; i += 16) top = _mm512_max_epu32(top, both(_mm512_load_si512(x + i), all(0x7fffffff)));
  const uint32_t bits = _mm512_reduce_max_epu32(top);
  float largest;
  memcpy(&largest, &bits, 4);
  float scale = largest / MOST, inverse = largest > 1e-30f ? MOST / largest : 0;
  if (bits >= 0x7f800000) scale = largest - largest, inverse = 0;
  Ints sums[P];
  for (int p = 0; p < P; p++) sums[p] = all(0);
  const __m128i order = BITS == 4   ? _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15)
                        : BITS == 2 ? _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15)
                                    : _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int64_t i = 0; i < length; i += 16) {
    Ints v = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_load_ps(x + i), _mm512_set1_ps(inverse)));
    UNROLL for (int p = 0; p < P; p++) {
      Ints low = _mm512_srai_epi32(_mm512_slli_epi32(v, 24), 24);
      sums[p] = _mm512_add_epi32(sums[p], low);
      _mm_storeu_si128((__m128i*)(out + p * step + i), _mm_shuffle_epi8(_mm512_cvtepi32_epi8(low), order));
      v = _mm512_srai_epi32(_mm512_sub_epi32(v, low), 8);
    }
  }
  float total = 0;
  for (int p = 0; p < P; p++) {
    const int32_t sum = _mm512_reduce_add_epi32(sums[p]);
    row->scale[p] = scale;
    row->minus[p] = sum;
    total += scale * (float)sum;
    scale *= 256;
  }
  row->sum = total;
}

// The digits' sums of a block: 16 rows times 16 columns.
template <int P> void sum_block(const Problem& t, const Block& b, int64_t r, const int8_t* codes, int32_t (*sums)[TILE][TILE]) {
  const int64_t stride = 4 * b.padded;
  const int8_t* x = (const int8_t*)t.digits + 4 * P * (b.vectors * t.padded_m + r * b.padded);
  _tile_zero(0);
  _tile_zero(1);
  if (P > 2) _tile_zero(2);
  for (int64_t v = 0; v < b.padded; v += t.depth, x += 4 * t.depth, codes += 64 * t.depth) {
    _tile_loadd(3, codes, 64);
    _tile_loadd(4, x, stride);
    _tile_dpbssd(0, 4, 3);
    _tile_loadd(5, x + TILE * stride, stride);
    _tile_dpbssd(1, 5, 3);
    if (P > 2) {
      _tile_loadd(6, x + 2 * TILE * stride, stride);
      _tile_dpbssd(2, 6, 3);
    }
  }
  _tile_stored(0, sums[0], 64);
  _tile_stored(1, sums[1], 64);
  if (P > 2) _tile_stored(2, sums[P - 1], 64);
}

// y of 16 rows and 16 columns, with some blocks more. `codes`: theirs.
template <int BITS, int P>
void tile(const Problem& t, const Block* blocks, int64_t count, int64_t r, int64_t j, __mmask16 columns, const int8_t* codes) {
  const int64_t rows = t.m - r < TILE ? t.m - r : TILE;
  alignas(64) int32_t both_sums[2][P][TILE][TILE];  // a block's are read once the next one's are on their way
  Floats y[TILE];
  UNROLL for (int i = 0; i < TILE; i++)
    y[i] = i < rows ? _mm512_maskz_loadu_ps(columns, t.sums + (r + i) * t.n + j) : fill(0);
  sum_block<P>(t, blocks[0], r, codes, both_sums[0]);
  for (int64_t at = 0; at < count; at++) {
    const Block* b = blocks + at;
    codes += 64 * b->padded;
    if (at + 1 < count) sum_block<P>(t, b[1], r, codes, both_sums[(at + 1) % 2]);
    const int32_t(*sums)[TILE][TILE] = both_sums[at % 2];
    const int64_t table = b->group * t.n + j;
    const Floats s = load(t.scales, t.scale_kind, table, columns);
    Floats o = fill(0);
    if (t.offsets) o = fma(s, fill(1 << (BITS - 1)), load(t.offsets, t.offset_kind, table, columns));
    const Row<P>* row = (const Row<P>*)t.rows + (b - t.blocks) * t.padded_m + r;
    const bool zeros = BITS == 8 && t.zeros;  // 128 less the zero point times the digits' sums is still to come
    Ints more = all(0);
    if (zeros) more = _mm512_sub_epi32(all(128), _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(columns, t.zeros + table)));
    UNROLL for (int i = 0; i < TILE; i++) {
      Ints low = _mm512_add_epi32(_mm512_load_si512(sums[0][i]), _mm512_slli_epi32(_mm512_load_si512(sums[1][i]), 8));
      if (zeros) low = _mm512_add_epi32(low, _mm512_mullo_epi32(more, all(row[i].minus[0] + 256 * row[i].minus[1])));
      Floats f = floats(low);
      if (P > 2) {
        Ints high = _mm512_load_si512(sums[P - 1][i]);
        if (zeros) high = _mm512_add_epi32(high, _mm512_mullo_epi32(more, all(row[i].minus[P - 1])));
        f = fma(floats(high), fill(65536), f);
      }
      y[i] = fma(f, times(s, fill(row[i].scale[0])), y[i]);
      if (t.offsets) y[i] = fma(o, fill(row[i].sum), y[i]);
    }
  }
  UNROLL for (int i = 0; i < TILE; i++)
    if (i < rows) _mm512_mask_storeu_ps(t.sums + (r + i) * t.n + j, columns, y[i]);
}

template <int BITS, int P> void columns_by_tiles(const Problem& t, int64_t begin, int64_t end) {
  alignas(64) int8_t codes[CODES_AT_ONCE];
  for (int64_t r = 0; r < t.m; r++) memset(t.sums + r * t.n + begin, 0, (end - begin) * 4);
  configure(t.depth);
  in_memory(t.digits);
  int64_t together = DIGITS_AT_ONCE / (t.k * P) / TILE * TILE;
  if (together < TILE) together = TILE;
  for (int64_t top = 0; top < t.m; top += together) {
    const int64_t bottom = top + together < t.m ? top + together : t.m;
    for (int64_t j = begin; j < end; j += TILE) {
      const __mmask16 columns = end - j < TILE ? (1 << (end - j)) - 1 : 0xffff;
      for (int64_t b = 0, last; b < t.count; b = last) {
        int64_t used = 0;
        for (last = b; last < t.count && used + 64 * t.blocks[last].padded <= CODES_AT_ONCE; last++) {
          unpack_block<BITS>(t, t.blocks[last], j, columns, codes + used);
          used += 64 * t.blocks[last].padded;
        }
        in_memory(codes);
        for (int64_t r = top; r < bottom; r += TILE) tile<BITS, P>(t, t.blocks + b, last - b, r, j, columns, codes);
      }
    }
  }
  _tile_release();
  rounded(t, begin, end);
}

}  // namespace
#endif
