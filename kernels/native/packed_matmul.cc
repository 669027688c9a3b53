// The packed matmul (product.h) as a handler for XLA's FFI, on as many threads of XLA's pool as help.
#include "product.h"
#include "threads.h"
#include "tiles.h"

namespace {

void some_columns(const void* problem, int64_t task) {
  const Problem& t = *(const Problem*)problem;
  int64_t begin = task * t.width, end = begin + t.width;
  t.columns(t, begin, end < t.n ? end : t.n);
}

// The digits of some rows, and by which path they are multiplied.
template <int BITS, int P> void some_digits(const void* problem, int64_t task) {
  const Problem& t = *(const Problem*)problem;
  const int64_t begin = task * t.height, end = begin + t.height < t.m ? begin + t.height : t.m;
  for (const Block* b = t.blocks; b < t.blocks + t.count; b++)
    for (int64_t r = begin; r < end; r++) {
      Row<P>* row = (Row<P>*)t.rows + (b - t.blocks) * t.padded_m + r;
#if defined(__AMX_INT8__)
      if (t.depth) {
        const int64_t step = 4 * TILE * b->padded, first = r / TILE * TILE;
        int8_t* out = (int8_t*)t.digits + 4 * P * (b->vectors * t.padded_m + first * b->padded) + 4 * b->padded * (r - first);
        digits_in_a_row<BITS, P>(t, *b, r, out, step, row);
        continue;
      }
#endif
      const int64_t before = r / MOST_ROWS * MOST_ROWS, step = t.m - before < MOST_ROWS ? t.m - before : MOST_ROWS;
      int32_t* out = t.digits + P * (b->vectors * t.m + b->padded * before);
      digits<BITS, P>(t, *b, r, out + (r - before), step, row);
    }
}

template <int BITS, int P> bool multiply(XLA_FFI_CallFrame* call, Problem t, int64_t group_size, int64_t batch) {
  using Codes = Period<BITS>;
  const int64_t most = t.groups * (group_size / BLOCK + 2);
  Block* blocks = (Block*)malloc(most * sizeof(Block));
  int64_t count = 0, vectors = 0, deepest = 0;
  for (int64_t g = 0; blocks && g < t.groups; g++)
    for (int64_t first = g * group_size; first < (g + 1) * group_size && first < t.k; first += BLOCK) {
      int64_t last = first + BLOCK < (g + 1) * group_size ? first + BLOCK : (g + 1) * group_size;
      last = last < t.k ? last : t.k;
      int64_t period = first / Codes::CODES, periods = (last + Codes::CODES - 1) / Codes::CODES - period;
      blocks[count++] = {g, first, last, period * Codes::WORDS, periods, 0, periods * Codes::VECTORS};
      deepest = periods * Codes::VECTORS > deepest ? periods * Codes::VECTORS : deepest;
    }
  t.padded_m = t.m, t.columns = columns<BITS, P>;
#if defined(__AMX_INT8__)
  if (t.m >= LEAST_ROWS) {
    t.depth = deepest <= 8 ? 8 : 16, t.padded_m = (t.m + TILE - 1) / TILE * TILE, t.columns = columns_by_tiles<BITS, P>;
    for (int64_t b = 0; b < count; b++) blocks[b].padded = (blocks[b].padded + t.depth - 1) / t.depth * t.depth;
  }
#endif
  for (int64_t b = 0; b < count; b++) blocks[b].vectors = vectors, vectors += blocks[b].padded;
  t.digits = (int32_t*)calloc(vectors * P * t.padded_m * 4 + 64, 1);
  t.rows = calloc(count * t.padded_m * sizeof(Row<P>) + 64, 1);
  float* sums = t.y_kind == Kind::F32 ? nullptr : (float*)malloc(t.m * t.n * 4 + 64);
  bool done = blocks && t.digits && t.rows && (sums || t.y_kind == Kind::F32);
  t.blocks = blocks, t.count = count;
  const int64_t threads = t.m * t.k * t.n < SMALL ? 1 : pool_size(call);
  // A thread's sums and the digits of a block stay in its cache; its columns fill whole lines of it.
  const int64_t fits = WIDTH / t.m / 64 * 64;
  t.width = t.depth ? t.n : fits < 64 ? 64 : fits;
  if (threads > 1 && t.n / t.width < 2 * threads) t.width = t.n / (2 * threads) / 64 * 64;
  if (t.width < 64) t.width = 64;
  t.height = t.m * t.k < FEW ? t.m : (t.m + 4 * threads - 1) / (4 * threads);
  const int64_t x_size = t.x_kind == Kind::F32 ? 4 : 2, s_size = t.scale_kind == Kind::F32 ? 4 : 2;
  const int64_t o_size = t.offset_kind == Kind::F32 ? 4 : 2, y_size = t.y_kind == Kind::F32 ? 4 : 2;
  for (int64_t i = 0; done && i < batch; i++) {
    t.sums = sums ? sums : (float*)t.y;
    done = spread(call, some_digits<BITS, P>, &t, (t.m + t.height - 1) / t.height, threads) &&
           spread(call, some_columns, &t, (t.n + t.width - 1) / t.width, threads);
    t.x = (const char*)t.x + t.m * t.k * x_size, t.y = (char*)t.y + t.m * t.n * y_size, t.q += t.words * t.n;
    t.scales = (const char*)t.scales + t.groups * t.n * s_size;
    if (t.zeros) t.zeros += t.groups * t.n;
    if (t.offsets) t.offsets = (const char*)t.offsets + t.groups * t.n * o_size;
  }
  free(blocks), free(t.digits), free(t.rows), free(sums);
  return done;
}

bool kind_of(const XLA_FFI_Buffer* b, Kind* kind) {
  if (b->dtype == XLA_FFI_DataType_F32) return *kind = Kind::F32, true;
  if (b->dtype == XLA_FFI_DataType_BF16) return *kind = Kind::BF16, true;
  return *kind = Kind::F16, b->dtype == XLA_FFI_DataType_F16;
}

template <int BITS> bool by_digits(XLA_FFI_CallFrame* call, const Problem& t, int64_t group_size, int64_t batch, int p) {
  return p == 2 ? multiply<BITS, 2>(call, t, group_size, batch) : multiply<BITS, 3>(call, t, group_size, batch);
}

}  // namespace

// x [B, m, K], qweight [B, W, N], scales [B, G, N], then zeros uint8 or offsets, both [B, G, N], or neither -> [B, m, N].
extern "C" __attribute__((visibility("default"))) XLA_FFI_Error* awq_packed_matmul(XLA_FFI_CallFrame* call) {
  if (tells_version(call)) return nullptr;
  const XLA_FFI_Error_Code invalid = XLA_FFI_Error_Code_INVALID_ARGUMENT;
  int32_t bits = 0, group_size = 0, digit_count = 0;  // attributes come sorted by name
  if (call->attrs.size != 3 || call->args.size < 3 || call->args.size > 4 || call->rets.size != 1)
    return fail(call->api, "packed matmul: wrong number of arguments", invalid);
  int32_t* attributes[3] = {&bits, &digit_count, &group_size};
  for (int i = 0; i < 3; i++) {
    if (call->attrs.types[i] != XLA_FFI_AttrType_SCALAR) return fail(call->api, "packed matmul: attribute", invalid);
    *attributes[i] = *(const int32_t*)((XLA_FFI_Scalar*)call->attrs.attrs[i])->value;
  }
  XLA_FFI_Buffer *x = (XLA_FFI_Buffer*)call->args.args[0], *q = (XLA_FFI_Buffer*)call->args.args[1];
  XLA_FFI_Buffer *s = (XLA_FFI_Buffer*)call->args.args[2], *y = (XLA_FFI_Buffer*)call->rets.rets[0];
  Problem t = {};
  t.x = x->data, t.q = (const uint32_t*)q->data, t.scales = s->data, t.y = y->data;
  bool fit = kind_of(x, &t.x_kind) && kind_of(s, &t.scale_kind) && kind_of(y, &t.y_kind);
  fit = fit && q->dtype == XLA_FFI_DataType_U32 && x->rank == 3 && q->rank == 3 && s->rank == 3 && y->rank == 3;
  if (fit && call->args.size == 4) {
    XLA_FFI_Buffer* more = (XLA_FFI_Buffer*)call->args.args[3];
    if (more->dtype == XLA_FFI_DataType_U8)
      t.zeros = (const uint8_t*)more->data;
    else
      t.offsets = more->data, fit = kind_of(more, &t.offset_kind);
    fit = fit && more->rank == 3 && more->dims[1] == s->dims[1] && more->dims[2] == s->dims[2];
  }
  if (!fit || group_size < 1) return fail(call->api, "packed matmul: wrong dtypes or ranks", invalid);
  const int64_t batch = x->dims[0];
  t.m = x->dims[1], t.k = x->dims[2], t.words = q->dims[1], t.n = q->dims[2], t.groups = s->dims[1];
  fit = q->dims[0] == batch && s->dims[0] == batch && y->dims[0] == batch && s->dims[2] == t.n && y->dims[2] == t.n;
  fit = fit && y->dims[1] == t.m && t.groups * group_size >= t.k && t.words * 32 >= t.groups * group_size * bits;
  if (!fit) return fail(call->api, "packed matmul: shapes that do not fit", invalid);
  if (!batch || !t.m || !t.n) return nullptr;
  bool done = false;
  switch (bits) {
    case 2: done = by_digits<2>(call, t, group_size, batch, digit_count); break;
    case 3: done = by_digits<3>(call, t, group_size, batch, digit_count); break;
    case 4: done = by_digits<4>(call, t, group_size, batch, digit_count); break;
    case 8: done = by_digits<8>(call, t, group_size, batch, digit_count); break;
    default: return fail(call->api, "packed matmul: bits", invalid);
  }
  return done ? nullptr : fail(call->api, "packed matmul: out of memory", XLA_FFI_Error_Code_RESOURCE_EXHAUSTED);
}

// Whether the system lets this process run what was compiled.
extern "C" __attribute__((visibility("default"))) int awq_allowed() {
#if defined(__AMX_INT8__)
  return tiles_allowed();
#else
  return 1;
#endif
}
