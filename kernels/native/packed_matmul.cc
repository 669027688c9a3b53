// The packed matmul (product.h) as a handler for XLA's FFI, on as many threads of XLA's pool as help.
#include <pthread.h>
#include <stdlib.h>

#include "product.h"
#include "xla/ffi/api/c_api.h"

namespace {

// One product on as many threads as help.
struct Job {
  const Problem* problem;
  int64_t tasks, next, done, holders;
  pthread_mutex_t lock;
  pthread_cond_t finished;
};

void work(Job* job) {
  for (;;) {
    int64_t i = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED);
    if (i >= job->tasks) return;  // from here on the problem may be gone
    const Problem& t = *job->problem;
    int64_t begin = i * t.width, end = begin + t.width;
    t.columns(t, begin, end < t.n ? end : t.n);
    if (__atomic_add_fetch(&job->done, 1, __ATOMIC_ACQ_REL) == job->tasks) {
      pthread_mutex_lock(&job->lock);
      pthread_cond_signal(&job->finished);
      pthread_mutex_unlock(&job->lock);
    }
  }
}

void release(Job* job) {
  if (__atomic_sub_fetch(&job->holders, 1, __ATOMIC_ACQ_REL)) return;
  pthread_mutex_destroy(&job->lock);
  pthread_cond_destroy(&job->finished);
  free(job);
}

void help(void* job) {
  work((Job*)job);
  release((Job*)job);
}

void discard(const XLA_FFI_Api* api, XLA_FFI_Error* error) {
  XLA_FFI_Error_Destroy_Args a = {XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, nullptr, error};
  api->XLA_FFI_Error_Destroy(&a);
}

// The caller works too and waits only for tasks that are running, so that no thread of a full pool waits for another.
bool spread(XLA_FFI_CallFrame* call, const Problem& t, int64_t threads) {
  Job* job = (Job*)calloc(1, sizeof(Job));
  if (!job) return false;
  job->problem = &t, job->tasks = (t.n + t.width - 1) / t.width, job->holders = 1;
  pthread_mutex_init(&job->lock, nullptr);
  pthread_cond_init(&job->finished, nullptr);
  for (int64_t i = 1; i < threads && i < job->tasks; i++) {
    __atomic_add_fetch(&job->holders, 1, __ATOMIC_RELAXED);
    XLA_FFI_ThreadPool_Schedule_Args a = {
        XLA_FFI_ThreadPool_Schedule_Args_STRUCT_SIZE, nullptr, call->ctx, help, job};
    if (XLA_FFI_Error* error = call->api->XLA_FFI_ThreadPool_Schedule(&a)) {
      discard(call->api, error);
      release(job);
      break;
    }
  }
  work(job);
  pthread_mutex_lock(&job->lock);
  while (__atomic_load_n(&job->done, __ATOMIC_ACQUIRE) < job->tasks) pthread_cond_wait(&job->finished, &job->lock);
  pthread_mutex_unlock(&job->lock);
  release(job);
  return true;
}

int64_t pool_size(XLA_FFI_CallFrame* call) {
  int64_t threads = 1;
  XLA_FFI_ThreadPool_NumThreads_Args a = {
      XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE, nullptr, call->ctx, &threads};
  if (XLA_FFI_Error* error = call->api->XLA_FFI_ThreadPool_NumThreads(&a)) discard(call->api, error);
  return threads < 1 ? 1 : threads;
}

template <int BITS, int P> bool multiply(XLA_FFI_CallFrame* call, Problem t, int64_t group_size, int64_t batch) {
  using Codes = Period<BITS>;
  const int64_t most = t.groups * (group_size / BLOCK + 2);
  Block* blocks = (Block*)malloc(most * sizeof(Block));
  int64_t count = 0, vectors = 0;
  for (int64_t g = 0; blocks && g < t.groups; g++)
    for (int64_t first = g * group_size; first < (g + 1) * group_size && first < t.k; first += BLOCK) {
      int64_t last = first + BLOCK < (g + 1) * group_size ? first + BLOCK : (g + 1) * group_size;
      last = last < t.k ? last : t.k;
      int64_t period = first / Codes::CODES, periods = (last + Codes::CODES - 1) / Codes::CODES - period;
      blocks[count++] = {g, first, last, period * Codes::WORDS, periods, vectors};
      vectors += periods * Codes::VECTORS;
    }
  int32_t* digits_of = (int32_t*)malloc(vectors * P * t.m * 4 + 64);
  Row<P>* rows = (Row<P>*)malloc(count * t.m * sizeof(Row<P>) + 64);
  float* sums = t.y_kind == Kind::F32 ? nullptr : (float*)malloc(t.m * t.n * 4 + 64);
  bool done = blocks && digits_of && rows && (sums || t.y_kind == Kind::F32);
  t.blocks = blocks, t.count = count, t.digits = digits_of, t.rows = rows, t.columns = columns<BITS, P>;
  const int64_t threads = t.m * t.k * t.n < SMALL ? 1 : pool_size(call);
  // A thread's sums and the digits of a block stay in its cache; its columns fill whole lines of it.
  t.width = WIDTH / t.m / 64 * 64;
  if (threads > 1 && t.n / t.width < 2 * threads) t.width = t.n / (2 * threads) / 64 * 64;
  if (t.width < 64) t.width = 64;
  const int64_t x_size = t.x_kind == Kind::F32 ? 4 : 2, s_size = t.scale_kind == Kind::F32 ? 4 : 2;
  const int64_t o_size = t.offset_kind == Kind::F32 ? 4 : 2, y_size = t.y_kind == Kind::F32 ? 4 : 2;
  for (int64_t i = 0; done && i < batch; i++) {
    t.sums = sums ? sums : (float*)t.y;
    for (int64_t b = 0; b < count; b++)
      for (int64_t r = 0; r < t.m; r++) {
        const int64_t before = r / MOST_ROWS * MOST_ROWS, step = t.m - before < MOST_ROWS ? t.m - before : MOST_ROWS;
        int32_t* out = digits_of + P * (blocks[b].vectors * t.m + blocks[b].periods * Codes::VECTORS * before);
        digits<BITS, P>(t, blocks[b], r, out + (r - before), step, rows + b * t.m + r);
      }
    if (threads == 1)
      for (int64_t j = 0; j < t.n; j += t.width) t.columns(t, j, j + t.width < t.n ? j + t.width : t.n);
    else
      done = spread(call, t, threads);
    t.x = (const char*)t.x + t.m * t.k * x_size, t.y = (char*)t.y + t.m * t.n * y_size, t.q += t.words * t.n;
    t.scales = (const char*)t.scales + t.groups * t.n * s_size;
    if (t.zeros) t.zeros += t.groups * t.n;
    if (t.offsets) t.offsets = (const char*)t.offsets + t.groups * t.n * o_size;
  }
  free(blocks), free(digits_of), free(rows), free(sums);
  return done;
}

XLA_FFI_Error* fail(const XLA_FFI_Api* api, const char* message, XLA_FFI_Error_Code code) {
  XLA_FFI_Error_Create_Args a = {XLA_FFI_Error_Create_Args_STRUCT_SIZE, nullptr, message, code};
  return api->XLA_FFI_Error_Create(&a);
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
  if (call->extension_start && call->extension_start->type == XLA_FFI_Extension_Metadata) {
    XLA_FFI_Metadata* data = ((XLA_FFI_Metadata_Extension*)call->extension_start)->metadata;
    data->api_version = {XLA_FFI_Api_Version_STRUCT_SIZE, nullptr, XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR};
    data->traits = 0;
    data->state_type_id = XLA_FFI_UNKNOWN_TYPE_ID;
    return nullptr;
  }
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
