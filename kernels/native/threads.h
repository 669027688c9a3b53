// Tasks of one call on as many threads of XLA's pool as help.
#pragma once
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>

#include "xla/ffi/api/c_api.h"

namespace {

typedef void (*Run)(const void* problem, int64_t task);

struct Job {
  Run run;
  const void* problem;
  int64_t tasks, next, done, holders;
  pthread_mutex_t lock;
  pthread_cond_t finished;
};

void work(Job* job) {
  for (;;) {
    int64_t i = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED);
    if (i >= job->tasks) return;  // from here on the problem may be gone
    job->run(job->problem, i);
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
bool spread(XLA_FFI_CallFrame* call, Run run, const void* problem, int64_t tasks, int64_t threads) {
  if (threads < 2 || tasks < 2) {
    for (int64_t i = 0; i < tasks; i++) run(problem, i);
    return true;
  }
  Job* job = (Job*)calloc(1, sizeof(Job));
  if (!job) return false;
  job->run = run, job->problem = problem, job->tasks = tasks, job->holders = 1;
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

XLA_FFI_Error* fail(const XLA_FFI_Api* api, const char* message, XLA_FFI_Error_Code code) {
  XLA_FFI_Error_Create_Args a = {XLA_FFI_Error_Create_Args_STRUCT_SIZE, nullptr, message, code};
  return api->XLA_FFI_Error_Create(&a);
}

// Whether a call only asks which version of XLA's interface this was compiled for; it is told.
bool tells_version(XLA_FFI_CallFrame* call) {
  if (call->extension_start && call->extension_start->type == XLA_FFI_Extension_Metadata) {
    XLA_FFI_Metadata* data = ((XLA_FFI_Metadata_Extension*)call->extension_start)->metadata;
    data->api_version = {XLA_FFI_Api_Version_STRUCT_SIZE, nullptr, XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR};
    data->traits = 0;
    data->state_type_id = XLA_FFI_UNKNOWN_TYPE_ID;
    return true;
  }
  return false;
}

}  // namespace
