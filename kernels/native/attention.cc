// Attention of one query for each row over what its slot keeps, as a handler for XLA's FFI.
//
// XLA's products with so few queries cost several times what reading the keys and values does, and have one length for
// all rows; here each row reads its own tokens, once for up to four heads that share them. The softmax is formed as
// tokens come (Milakov and Gimelshein, arXiv:1805.02867). A row's result depends on nothing but the row.
#include "threads.h"
#include "vectors.h"

namespace {

constexpr int64_t TOKENS = 128;      // whose scores are held at once
constexpr int64_t MOST_DIM = 512;    // of a head
constexpr int64_t TOGETHER = 4;      // heads
constexpr int64_t LITTLE = 200000;   // up to so many products other threads cost more than they help

struct Attention {
  const float *q, *keys, *values;  // [B, H, D], [S, KV, A, D], [S, KV, A, E]
  const int32_t* positions;        // [B]
  float* y;                        // [B, H, E]
  int64_t first, heads, groups, dim, value_dim, slots, length, window;
  float scale;
};

// x := exp(x) of 16 numbers that are at most 0, within two units in the last place; 0 below -87.
inline void exponentials(float* x) {
  for (int i = 0; i < 16; i++) {
    float v = x[i] < -87.f ? -87.f : x[i], n = __builtin_rintf(v * 1.44269504f);
    float r = v - n * 0.693359375f + n * 2.12194440e-4f, p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f, p = p * r + 8.3334519073e-3f, p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f, p = p * r + 5.0000001201e-1f, p = p * r * r + r + 1.f;
    int32_t bits = ((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    x[i] = x[i] < -87.f ? 0.f : p * power;
  }
}

// G heads that share keys and values, from q and to y, over the tokens [begin, end).
template <int G>
__attribute__((noinline)) void heads(const Attention& t, const float* q, const float* keys, const float* values, float* y,
                                     int64_t begin, int64_t end) {
  alignas(64) float scaled[G][MOST_DIM], sums[G][MOST_DIM] = {}, scores[G][TOKENS];
  float most[G], weight[G] = {};
  for (int g = 0; g < G; g++) {
    most[g] = -__builtin_inff();
    for (int64_t d = 0; d < t.dim; d++) scaled[g][d] = q[g * t.dim + d] * t.scale;
  }
  for (int64_t at = begin; at < end; at += TOKENS) {
    const int64_t count = end - at < TOKENS ? end - at : TOKENS, filled = (count + 15) / 16 * 16;
    for (int64_t i = 0; i < count; i++) {
      const float* k = keys + (at + i) * t.dim;
      Floats sum[G];
      UNROLL for (int g = 0; g < G; g++) sum[g] = fill(0);
      for (int64_t d = 0; d < t.dim; d += LANES)
        UNROLL for (int g = 0; g < G; g++) sum[g] = fma(load(scaled[g] + d), load(k + d), sum[g]);
      UNROLL for (int g = 0; g < G; g++) scores[g][i] = total(sum[g]);
    }
    for (int g = 0; g < G; g++) {
      float top = most[g];
      for (int64_t i = 0; i < count; i++) top = scores[g][i] > top ? scores[g][i] : top;
      alignas(64) float less[16] = {most[g] - top};
      exponentials(less);
      weight[g] *= less[0];
      for (int64_t d = 0; d < t.value_dim; d += LANES) store(sums[g] + d, times(load(sums[g] + d), fill(less[0])));
      for (int64_t i = 0; i < filled; i++) scores[g][i] = i < count ? scores[g][i] - top : -__builtin_inff();
      for (int64_t i = 0; i < filled; i += 16) exponentials(scores[g] + i);
      Floats sum = fill(0);
      for (int64_t i = 0; i < filled; i += LANES) sum = fma(load(scores[g] + i), fill(1), sum);
      weight[g] += total(sum), most[g] = top;
    }
    for (int64_t d = 0; d < t.value_dim; d += 2 * LANES) {
      const bool two = d + LANES < t.value_dim;
      Floats a[G], b[G];
      UNROLL for (int g = 0; g < G; g++) a[g] = load(sums[g] + d), b[g] = two ? load(sums[g] + d + LANES) : fill(0);
      const float* v = values + at * t.value_dim + d;
      for (int64_t i = 0; i < count; i++, v += t.value_dim) {
        Floats x = load(v), z = two ? load(v + LANES) : x;
        UNROLL for (int g = 0; g < G; g++) a[g] = fma(fill(scores[g][i]), x, a[g]), b[g] = fma(fill(scores[g][i]), z, b[g]);
      }
      UNROLL for (int g = 0; g < G; g++) {
        store(sums[g] + d, a[g]);
        if (two) store(sums[g] + d + LANES, b[g]);
      }
    }
  }
  for (int g = 0; g < G; g++)
    for (int64_t d = 0; d < t.value_dim; d++) y[g * t.value_dim + d] = sums[g][d] / weight[g];
}

// A task is a row and the heads that share keys and values.
void attend(const void* problem, int64_t task) {
  const Attention& t = *(const Attention*)problem;
  const int64_t row = task / t.groups, group = task % t.groups, each = t.heads / t.groups, slot = t.first + row;
  const float* q = t.q + (row * t.heads + group * each) * t.dim;
  float* y = t.y + (row * t.heads + group * each) * t.value_dim;
  const int64_t end = (int64_t)t.positions[row] + 1, begin = t.window && end > t.window ? end - t.window : 0;
  if (end < 1 || end > t.length) {  // at no work
    memset(y, 0, each * t.value_dim * 4);
    return;
  }
  const float *keys = t.keys + (slot * t.groups + group) * t.length * t.dim;
  const float *values = t.values + (slot * t.groups + group) * t.length * t.value_dim;
  for (int64_t h = 0; h < each; h += TOGETHER, q += TOGETHER * t.dim, y += TOGETHER * t.value_dim) switch (each - h) {
      case 1: heads<1>(t, q, keys, values, y, begin, end); break;
      case 2: heads<2>(t, q, keys, values, y, begin, end); break;
      case 3: heads<3>(t, q, keys, values, y, begin, end); break;
      default: heads<4>(t, q, keys, values, y, begin, end);
    }
}

bool has(const XLA_FFI_Buffer* b, XLA_FFI_DataType dtype, int64_t rank) { return b->dtype == dtype && b->rank == rank; }

}  // namespace

// q [B, H, D], keys [S, KV, A, D], values [S, KV, A, E], first slot [], positions [B] -> [B, H, E].
extern "C" __attribute__((visibility("default"))) XLA_FFI_Error* awq_attention(XLA_FFI_CallFrame* call) {
  if (tells_version(call)) return nullptr;
  const XLA_FFI_Error_Code invalid = XLA_FFI_Error_Code_INVALID_ARGUMENT;
  const XLA_FFI_DataType number = XLA_FFI_DataType_F32, whole = XLA_FFI_DataType_S32;
  if (call->attrs.size != 2 || call->args.size != 5 || call->rets.size != 1)  // attributes come sorted by name
    return fail(call->api, "attention: wrong number of arguments", invalid);
  for (int i = 0; i < 2; i++)
    if (call->attrs.types[i] != XLA_FFI_AttrType_SCALAR) return fail(call->api, "attention: attribute", invalid);
  XLA_FFI_Buffer *q = (XLA_FFI_Buffer*)call->args.args[0], *k = (XLA_FFI_Buffer*)call->args.args[1];
  XLA_FFI_Buffer *v = (XLA_FFI_Buffer*)call->args.args[2], *first = (XLA_FFI_Buffer*)call->args.args[3];
  XLA_FFI_Buffer *positions = (XLA_FFI_Buffer*)call->args.args[4], *y = (XLA_FFI_Buffer*)call->rets.rets[0];
  bool fit = has(q, number, 3) && has(k, number, 4) && has(v, number, 4) && has(first, whole, 0);
  fit = fit && has(positions, whole, 1) && has(y, number, 3);
  if (!fit) return fail(call->api, "attention: wrong dtypes or ranks", invalid);
  Attention t = {};
  t.scale = *(const float*)((XLA_FFI_Scalar*)call->attrs.attrs[0])->value;
  t.window = *(const int32_t*)((XLA_FFI_Scalar*)call->attrs.attrs[1])->value;
  t.q = (const float*)q->data, t.keys = (const float*)k->data, t.values = (const float*)v->data, t.y = (float*)y->data;
  t.positions = (const int32_t*)positions->data;
  t.heads = q->dims[1], t.dim = q->dims[2], t.slots = k->dims[0], t.groups = k->dims[1], t.length = k->dims[2];
  t.value_dim = v->dims[3];
  const int64_t rows = q->dims[0];
  fit = k->dims[3] == t.dim && v->dims[0] == t.slots && v->dims[1] == t.groups && v->dims[2] == t.length;
  fit = fit && positions->dims[0] == rows && y->dims[0] == rows && y->dims[1] == t.heads && y->dims[2] == t.value_dim;
  fit = fit && t.groups > 0 && t.heads % t.groups == 0 && rows <= t.slots && t.window >= 0;
  fit = fit && t.dim % 16 == 0 && t.value_dim % 16 == 0 && t.dim <= MOST_DIM && t.value_dim <= MOST_DIM;
  if (!fit) return fail(call->api, "attention: shapes that do not fit", invalid);
  t.first = *(const int32_t*)first->data;  // held within the slots, as XLA's slices are
  if (t.first > t.slots - rows) t.first = t.slots - rows;
  if (t.first < 0) t.first = 0;
  int64_t products = 0;
  for (int64_t i = 0; i < rows; i++) products += t.positions[i] < t.length ? t.positions[i] + 1 : 0;
  products *= t.heads * (t.dim + t.value_dim);
  if (!spread(call, attend, &t, rows * t.groups, products < LITTLE ? 1 : pool_size(call)))
    return fail(call->api, "attention: out of memory", XLA_FFI_Error_Code_RESOURCE_EXHAUSTED);
  return nullptr;
}
