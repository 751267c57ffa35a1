/* The custom operator WeightedSum for ONNX Runtime on a CPU: the sum of gate * feature over many features, in one pass.

   Inputs, all float32: K gates (W, B, 1, C), then K features (B, N, C). If the number of inputs is odd, the first input
   is an initial value of the sum, (W, B, N, C) or (B, N, C) or (1, N, C). The output is (W, B, N, C). If the gates have
   no dimension W, the output has none.

   The C API of ONNX Runtime is a table of functions in a fixed order. This file declares only the used part, of API
   version 17 (onnxruntime_c_api.h, ONNX Runtime 1.17). */

#include <stddef.h>
#include <stdint.h>

typedef void (*Function)(void);
typedef struct Status Status;
typedef struct Value Value;
typedef struct Context Context;
typedef struct Shape Shape;
typedef struct Domain Domain;
typedef struct Options Options;
typedef struct Operator Operator;

enum {
  API_VERSION = 17,
  /* indices in the table */
  CREATE_DOMAIN = 26,
  DOMAIN_ADD = 27,
  OPTIONS_ADD = 28,
  TENSOR_DATA = 51,
  SHAPE_RANK = 61,
  SHAPE_SIZES = 62,
  TENSOR_SHAPE = 65,
  INPUT_COUNT = 88,
  INPUT = 90,
  OUTPUT = 91,
  SHAPE_RELEASE = 99,
  PARALLEL_FOR = 274,
  /* values of the API's enumerations */
  FLOAT = 1,
  REQUIRED = 0,
  VARIADIC = 2,
};

typedef struct {
  const Function *(*api)(uint32_t version);
  const char *(*version)(void);
} ApiBase;

struct Operator {
  uint32_t version;
  void *(*create)(const Operator *, const Function *, const void *);
  const char *(*name)(const Operator *);
  const char *(*provider)(const Operator *);
  int (*input_type)(const Operator *, size_t);
  size_t (*input_count)(const Operator *);
  int (*output_type)(const Operator *, size_t);
  size_t (*output_count)(const Operator *);
  void (*compute)(void *, Context *);
  void (*destroy)(void *);
  int (*input_kind)(const Operator *, size_t);
  int (*output_kind)(const Operator *, size_t);
  int (*input_memory)(const Operator *, size_t);
  int (*least_inputs)(const Operator *);
  int (*inputs_alike)(const Operator *);
  int (*least_outputs)(const Operator *);
  int (*outputs_alike)(const Operator *);
  Status *(*create_checked)(const Operator *, const Function *, const void *, void **);
  Status *(*compute_checked)(void *, Context *);
  Status *(*infer_shape)(const Operator *, void *);
  int (*first_opset)(const Operator *);
  int (*last_opset)(const Operator *);
};

static const Function *api;

#define CALL(index, ...) ((Status * (*)()) api[index])(__VA_ARGS__)
#define TRY(call)                        \
  do {                                   \
    Status *failure = (call);            \
    if (failure != NULL) return failure; \
  } while (0)

/* ---- the sum ---- */

enum { MOST_TERMS = 64, TOKENS = 16, MOST_RANK = 8, STEPS = 6 };

/* Sums of STEPS steps and VECTORS * LANES channels are kept in registers; AVX-512 has 32. */
#ifdef __AVX512F__
enum { LANES = 16, VECTORS = 4 };
#else
enum { LANES = 8, VECTORS = 2 };
#endif
enum { STRIDE = LANES * VECTORS };

typedef float Lanes __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float))));

typedef struct {
  const float *begun, *gates[MOST_TERMS], *features[MOST_TERMS];
  float *sums;
  size_t terms, window, batch, tokens, channels, blocks;
  size_t begun_step, begun_sample, gate_step, sum_step; /* strides */
} Sum;

/* Offsets of STRIDE consecutive channels of one token at the first step: in the initial value, in its gates, in a
   feature, and in its sum. The next step adds the step stride of `Sum` to them. */
typedef struct {
  size_t begun, gate, feature, sum;
} Offsets;

/* Sums STRIDE channels of one token for a few steps and reads each feature once. The next channels are prefetched. */
static inline __attribute__((always_inline)) void add_stretch(const Sum *sum, Offsets at, const size_t steps) {
  Lanes totals[STEPS][VECTORS] = {0};
  if (sum->begun)
    for (size_t step = 0; step < steps; step++)
      for (int v = 0; v < VECTORS; v++) {
        const float *begun = sum->begun + at.begun + step * sum->begun_step + v * LANES;
        totals[step][v] = *(const Lanes *)begun;
        __builtin_prefetch(begun + STRIDE);
      }
  for (size_t term = 0; term < sum->terms; term++) {
    const float *feature = sum->features[term] + at.feature, *gate = sum->gates[term] + at.gate;
    Lanes stretch[VECTORS];
    for (int v = 0; v < VECTORS; v++) {
      stretch[v] = ((const Lanes *)feature)[v];
      __builtin_prefetch(feature + STRIDE + v * LANES);
    }
    for (size_t step = 0; step < steps; step++)
      for (int v = 0; v < VECTORS; v++)
        totals[step][v] += ((const Lanes *)(gate + step * sum->gate_step))[v] * stretch[v];
  }
  for (size_t step = 0; step < steps; step++)
    for (int v = 0; v < VECTORS; v++) ((Lanes *)(sum->sums + at.sum + step * sum->sum_step))[v] = totals[step][v];
}

/* The same for the last channels, if they are fewer than STRIDE. */
static void add_rest(const Sum *sum, Offsets at, size_t steps, size_t channels) {
  for (size_t step = 0; step < steps; step++)
    for (size_t c = 0; c < channels; c++) {
      float total = sum->begun ? sum->begun[at.begun + step * sum->begun_step + c] : 0;
      for (size_t term = 0; term < sum->terms; term++)
        total += sum->gates[term][at.gate + step * sum->gate_step + c] * sum->features[term][at.feature + c];
      sum->sums[at.sum + step * sum->sum_step + c] = total;
    }
}

/* Computes block k: up to TOKENS tokens of one sample. */
static void add_up(void *data, size_t k) {
  const Sum *sum = data;
  size_t sample = k / sum->blocks, first = k % sum->blocks * TOKENS, channels = sum->channels;
  size_t last = first + TOKENS < sum->tokens ? first + TOKENS : sum->tokens;
  for (size_t token = first; token < last; token++)
    for (size_t channel = 0; channel < channels; channel += STRIDE)
      for (size_t step = 0; step < sum->window; step += STEPS) {
        size_t steps = sum->window - step < STEPS ? sum->window - step : STEPS;
        Offsets at;
        at.begun = step * sum->begun_step + sample * sum->begun_sample + token * channels + channel;
        at.gate = step * sum->gate_step + sample * channels + channel;
        at.feature = (sample * sum->tokens + token) * channels + channel;
        at.sum = step * sum->sum_step + at.feature;
        if (channel + STRIDE > channels) {
          add_rest(sum, at, steps, channels - channel);
          continue;
        }
        switch (steps) { /* a constant number of steps, so that the compiler keeps the sums in registers */
          case 1: add_stretch(sum, at, 1); break;
          case 2: add_stretch(sum, at, 2); break;
          case 3: add_stretch(sum, at, 3); break;
          case 4: add_stretch(sum, at, 4); break;
          case 5: add_stretch(sum, at, 5); break;
          default: add_stretch(sum, at, STEPS);
        }
      }
}

/* ---- callbacks of ONNX Runtime ---- */

static Status *input(Context *context, size_t k, const float **data, int64_t *sizes, size_t *rank) {
  const Value *value;
  Shape *shape;
  TRY(CALL(INPUT, context, k, &value));
  TRY(CALL(TENSOR_DATA, value, data));
  TRY(CALL(TENSOR_SHAPE, value, &shape));
  Status *failure = CALL(SHAPE_RANK, shape, rank);
  if (failure == NULL) failure = CALL(SHAPE_SIZES, shape, sizes, *rank);
  ((void (*)(Shape *))api[SHAPE_RELEASE])(shape);
  return failure;
}

static Status *compute(void *kernel, Context *context) {
  Sum sum = {0};
  size_t count, rank, gate_rank, begun_rank = 0;
  int64_t sizes[MOST_RANK], gate_sizes[MOST_RANK], begun_sizes[MOST_RANK];
  (void)kernel;
  TRY(CALL(INPUT_COUNT, context, &count));
  size_t begun = count % 2;
  sum.terms = count / 2;
  if (begun) TRY(input(context, 0, &sum.begun, begun_sizes, &begun_rank));
  for (size_t k = 0; k < sum.terms; k++) TRY(input(context, begun + k, &sum.gates[k], gate_sizes, &gate_rank));
  for (size_t k = 0; k < sum.terms; k++)
    TRY(input(context, begun + sum.terms + k, &sum.features[k], sizes, &rank));
  sum.window = gate_rank == 4 ? (size_t)gate_sizes[0] : 1;
  sum.batch = (size_t)sizes[0], sum.tokens = (size_t)sizes[1], sum.channels = (size_t)sizes[2];
  sum.blocks = (sum.tokens + TOKENS - 1) / TOKENS;
  size_t sample = sum.tokens * sum.channels;
  sum.gate_step = sum.batch * sum.channels;
  sum.sum_step = sum.batch * sample;
  sum.begun_step = begun_rank == 4 ? sum.sum_step : 0;
  sum.begun_sample = begun_rank == 4 || (begun_rank == 3 && begun_sizes[0] != 1) ? sample : 0;
  int64_t all[] = {(int64_t)sum.window, sizes[0], sizes[1], sizes[2]};
  Value *output;
  TRY(CALL(OUTPUT, context, (size_t)0, all + 4 - gate_rank, gate_rank, &output));
  TRY(CALL(TENSOR_DATA, output, &sum.sums));
  if (sum.window == 0) return NULL;
  return CALL(PARALLEL_FOR, context, add_up, sum.batch * sum.blocks, (size_t)0, &sum);
}

static Status *create(const Operator *operator, const Function *table, const void *info, void **kernel) {
  (void)operator, (void)table, (void)info;
  *kernel = NULL;
  return NULL;
}

static void destroy(void *kernel) { (void)kernel; }
static const char *name(const Operator *operator) { return (void)operator, "WeightedSum"; }
static const char *provider(const Operator *operator) { return (void)operator, NULL; }
static int type(const Operator *operator, size_t k) { return (void)operator, (void)k, FLOAT; }
static size_t one_edge(const Operator *operator) { return (void)operator, 1; }
static int variadic(const Operator *operator, size_t k) { return (void)operator, (void)k, VARIADIC; }
static int required(const Operator *operator, size_t k) { return (void)operator, (void)k, REQUIRED; }
static int plain_memory(const Operator *operator, size_t k) { return (void)operator, (void)k, 0; }
static int one(const Operator *operator) { return (void)operator, 1; }

static const Operator weighted_sum = {
    .version = API_VERSION,
    .name = name,
    .provider = provider,
    .input_type = type,
    .input_count = one_edge,
    .output_type = type,
    .output_count = one_edge,
    .destroy = destroy,
    .input_kind = variadic,
    .output_kind = required,
    .input_memory = plain_memory,
    .least_inputs = one,
    .inputs_alike = one,
    .least_outputs = one,
    .outputs_alike = one,
    .create_checked = create,
    .compute_checked = compute,
    .first_opset = one,
    .last_opset = one,
};

Status *RegisterCustomOps(Options *options, const ApiBase *base) {
  static Domain *domain; /* one per process, because sessions keep a pointer to it */
  api = base->api(API_VERSION);
  if (domain == NULL) {
    TRY(CALL(CREATE_DOMAIN, "fora_trt", &domain));
    TRY(CALL(DOMAIN_ADD, domain, &weighted_sum));
  }
  return CALL(OPTIONS_ADD, options, domain);
}
