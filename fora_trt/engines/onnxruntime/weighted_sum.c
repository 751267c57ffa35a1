/* The custom operator WeightedSum for ONNX Runtime on a CPU: the sum of gate * feature over many features, in one pass.

   Inputs, all float32: with the attribute begins=1 an initial value of the sum, (W, B, N, C) or (B, N, C) or (1, N, C);
   with begins=2 initial values of the first V of W sums, (V, B, N, C), which may be the memory of the output, and W
   weights (W): each sum is multiplied by its weight before its initial value is added; the gates; K features (B, N, C).
   With the attribute first=-1 there are K gates (W, B, 1, C). With first=F there is
   one tensor (W, B, G, C), and the gates are its rows from F on. The output is (W, B, N, C). If the gates have no
   dimension W, the output has none. Inputs of other numbers or shapes are refused: nothing is read beyond their ends.

   The C API of ONNX Runtime is a table of functions in a fixed order. This file declares only the used part, of API
   version 17 (onnxruntime_c_api.h, ONNX Runtime 1.17). */

#include <stddef.h>
#include <stdint.h>
#if defined(__AVX512F__) || defined(__AVX__)
#include <immintrin.h>
#endif

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
  CREATE_STATUS = 0,
  CREATE_DOMAIN = 26,
  DOMAIN_ADD = 27,
  OPTIONS_ADD = 28,
  TENSOR_DATA = 51,
  SHAPE_RANK = 61,
  SHAPE_SIZES = 62,
  TENSOR_SHAPE = 65,
  ATTRIBUTE_INT = 86,
  INPUT_COUNT = 88,
  INPUT = 90,
  OUTPUT = 91,
  SHAPE_RELEASE = 99,
  PARALLEL_FOR = 274,
  /* values of the API's enumerations */
  FLOAT = 1,
  REQUIRED = 0,
  INVALID_ARGUMENT = 2,
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

enum { MOST_TERMS = 64, TOKENS = 16, MOST_RANK = 8, STEPS = 6, PAIR = 2, AHEAD = 2 * PAIR, CACHED = 1 << 20 };

/* Sums of STEPS steps and VECTORS * LANES channels are kept in registers; AVX-512 has 32. */
#ifdef __AVX512F__
enum { LANES = 16, VECTORS = 2 };
#else
enum { LANES = 8, VECTORS = 1 };
#endif
enum { STRIDE = LANES * VECTORS, NEAR = 2 /* prefetch to the second-level cache */ };

typedef float Lanes __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float))));

typedef struct {
  const float *begun, *weights, *gates[MOST_TERMS], *features[MOST_TERMS];
  float *sums;
  size_t terms, window, batch, tokens, channels, blocks;
  size_t begun_rows, begun_step, begun_sample, gate_step, gate_sample, sum_step; /* strides */
  int past_cache;
} Sum;

/* Offsets of consecutive channels of one token at the first step: in the initial value, in its gates, in a
   feature, and in its sum. The next step adds the step stride of `Sum` to them. `step` is the number of the first step;
   the first `begins` steps have an initial value. */
typedef struct {
  size_t begun, gate, feature, sum, step, begins;
} Offsets;

/* Stores LANES sums, past the cache if the window of sums is large: it would not stay there until it is read. */
static inline __attribute__((always_inline)) void store(float *sums, Lanes value, int past_cache) {
#if defined(__AVX512F__)
  if (past_cache)
    _mm512_stream_ps(sums, (__m512)value);
  else
#elif defined(__AVX__)
  if (past_cache)
    _mm256_stream_ps(sums, (__m256)value);
  else
#endif
    *(Lanes *)sums = value;
}

/* Sums vectors * LANES channels of one or two tokens for a few steps: reads each feature once, and each gate once for
   both tokens. What the tokens after the next ones read is prefetched. */
static inline __attribute__((always_inline)) void add_stretch(const Sum *sum, Offsets at, const size_t steps,
                                                              const int vectors, const int tokens) {
  Lanes totals[STEPS][PAIR][VECTORS] = {0};
  if (sum->begun && !sum->weights)
    for (size_t step = 0; step < steps; step++)
      for (int t = 0; t < tokens; t++)
        for (int v = 0; v < vectors; v++)
          totals[step][t][v] =
              *(const Lanes *)(sum->begun + at.begun + step * sum->begun_step + t * sum->channels + v * LANES);
  for (size_t term = 0; term < sum->terms; term++) {
    const float *feature = sum->features[term] + at.feature, *gate = sum->gates[term] + at.gate;
    Lanes stretch[PAIR][VECTORS];
    for (int t = 0; t < tokens; t++)
      for (int v = 0; v < vectors; v++) {
        stretch[t][v] = ((const Lanes *)(feature + t * sum->channels))[v];
        if (at.step == 0) __builtin_prefetch(feature + (t + AHEAD) * sum->channels + v * LANES, 0, NEAR);
      }
    for (size_t step = 0; step < steps; step++)
      for (int v = 0; v < vectors; v++) {
        Lanes factor = ((const Lanes *)(gate + step * sum->gate_step))[v];
        for (int t = 0; t < tokens; t++) totals[step][t][v] += factor * stretch[t][v];
      }
  }
  if (sum->weights)
    for (size_t step = 0; step < steps; step++) {
      const float *begun = step < at.begins ? sum->begun + at.begun + step * sum->begun_step : NULL;
      for (int t = 0; t < tokens; t++)
        for (int v = 0; v < vectors; v++) {
          Lanes start = {0};
          if (begun) {
            start = *(const Lanes *)(begun + t * sum->channels + v * LANES);
            __builtin_prefetch(begun + (t + AHEAD) * sum->channels + v * LANES, 0, NEAR);
          }
          totals[step][t][v] = totals[step][t][v] * sum->weights[at.step + step] + start; /* fused, as in torch */
        }
    }
  for (size_t step = 0; step < steps; step++)
    for (int t = 0; t < tokens; t++)
      for (int v = 0; v < vectors; v++)
        store(sum->sums + at.sum + step * sum->sum_step + t * sum->channels + v * LANES, totals[step][t][v],
              sum->past_cache);
}

/* The same with a constant number of steps, so that the compiler keeps the sums in registers. */
static inline __attribute__((always_inline)) void add_steps(const Sum *sum, Offsets at, size_t steps,
                                                            const int vectors, const int tokens) {
  switch (steps) {
    case 1: add_stretch(sum, at, 1, vectors, tokens); break;
    case 2: add_stretch(sum, at, 2, vectors, tokens); break;
    case 3: add_stretch(sum, at, 3, vectors, tokens); break;
    case 4: add_stretch(sum, at, 4, vectors, tokens); break;
    case 5: add_stretch(sum, at, 5, vectors, tokens); break;
    default: add_stretch(sum, at, STEPS, vectors, tokens);
  }
}

/* The same for the last channels, if they are fewer than LANES. */
static void add_rest(const Sum *sum, Offsets at, size_t steps, size_t channels, size_t tokens) {
  for (size_t step = 0; step < steps; step++)
    for (size_t token = 0; token < tokens; token++)
      for (size_t c = 0; c < channels; c++) {
        size_t here = token * sum->channels + c;
        float begun = step < at.begins ? sum->begun[at.begun + step * sum->begun_step + here] : 0;
        float total = sum->weights ? 0 : begun;
        for (size_t term = 0; term < sum->terms; term++)
          total += sum->gates[term][at.gate + step * sum->gate_step + c] * sum->features[term][at.feature + here];
        if (sum->weights) total = total * sum->weights[at.step + step] + begun;
        sum->sums[at.sum + step * sum->sum_step + here] = total;
      }
}

/* Computes block k: up to TOKENS tokens of one sample. The gates of a few steps and channels stay in the cache for all
   of them. */
static void add_up(void *data, size_t k) {
  const Sum *sum = data;
  size_t sample = k / sum->blocks, first = k % sum->blocks * TOKENS, channels = sum->channels;
  size_t last = first + TOKENS < sum->tokens ? first + TOKENS : sum->tokens;
  for (size_t step = 0; step < sum->window; step += STEPS) {
    size_t steps = sum->window - step < STEPS ? sum->window - step : STEPS;
    for (size_t channel = 0, width; channel < channels; channel += width) {
      size_t left = channels - channel;
      width = left >= STRIDE ? STRIDE : left >= LANES ? LANES : left;
      for (size_t token = first, tokens; token < last; token += tokens) {
        tokens = last - token < PAIR ? 1 : PAIR;
        Offsets at;
        at.begun = step * sum->begun_step + sample * sum->begun_sample + token * channels + channel;
        at.gate = step * sum->gate_step + sample * sum->gate_sample + channel;
        at.feature = (sample * sum->tokens + token) * channels + channel;
        at.sum = step * sum->sum_step + at.feature;
        at.step = step;
        at.begins = sum->begun_rows > step ? sum->begun_rows - step : 0;
        if (width < LANES)
          add_rest(sum, at, steps, width, tokens);
        else if (width < STRIDE)
          tokens == PAIR ? add_steps(sum, at, steps, 1, PAIR) : add_steps(sum, at, steps, 1, 1);
        else
          tokens == PAIR ? add_steps(sum, at, steps, VECTORS, PAIR) : add_steps(sum, at, steps, VECTORS, 1);
      }
    }
  }
}

/* ---- callbacks of ONNX Runtime ---- */

static Status *refused(const char *why) { return CALL(CREATE_STATUS, (int)INVALID_ARGUMENT, why); }

typedef struct {
  size_t rank;
  int64_t sizes[MOST_RANK];
} Sizes;

static Status *input(Context *context, size_t k, const float **data, Sizes *found) {
  const Value *value;
  Shape *shape;
  TRY(CALL(INPUT, context, k, &value));
  if (value == NULL) return refused("WeightedSum lacks an input");
  TRY(CALL(TENSOR_DATA, value, data));
  TRY(CALL(TENSOR_SHAPE, value, &shape));
  Status *failure = CALL(SHAPE_RANK, shape, &found->rank);
  if (failure == NULL && found->rank > MOST_RANK) failure = refused("WeightedSum has an input of too many dimensions");
  if (failure == NULL) failure = CALL(SHAPE_SIZES, shape, found->sizes, found->rank);
  ((void (*)(Shape *))api[SHAPE_RELEASE])(shape);
  return failure;
}

static int equal(const Sizes *one, const Sizes *other) {
  int same = one->rank == other->rank;
  for (size_t k = 0; same && k < one->rank; k++) same = one->sizes[k] == other->sizes[k];
  return same;
}

/* Whether an initial value has a shape that the top of this file lists; nothing is read beyond its end then. */
static int begins_well(size_t begun, const Sizes *initial, const Sizes *weights, const Sizes *gates,
                       const Sizes *features) {
  size_t rank = initial->rank;
  if (begun == 0) return 1;
  if (rank < 3 || rank > 4 || rank > gates->rank || (begun == 2 && rank != 4)) return 0;
  const int64_t *last = initial->sizes + rank - 3, *wanted = features->sizes;
  int shared = rank == 3 && last[0] == 1;
  if ((last[0] != wanted[0] && !shared) || last[1] != wanted[1] || last[2] != wanted[2]) return 0;
  if (begun == 2) return weights->rank == 1 && weights->sizes[0] == gates->sizes[0] && initial->sizes[0] <= gates->sizes[0];
  return rank == 3 || initial->sizes[0] == gates->sizes[0];
}

static Status *compute(void *kernel, Context *context) {
  Sum sum = {0};
  size_t count;
  Sizes feature = {0}, gate = {0}, initial = {0}, weight = {0}, other = {0};
  intptr_t attributes = (intptr_t)kernel; /* see `create` */
  size_t begun = attributes & 3, joined = attributes > 3, first = joined ? (size_t)(attributes >> 2) - 1 : 0;
  TRY(CALL(INPUT_COUNT, context, &count));
  if (count < begun + 2 || (!joined && (count - begun) % 2)) return refused("WeightedSum has no gate for each feature");
  sum.terms = joined ? count - begun - 1 : (count - begun) / 2;
  if (sum.terms > MOST_TERMS) return refused("WeightedSum has more than 64 terms");
  size_t first_feature = count - sum.terms;
  if (begun) TRY(input(context, 0, &sum.begun, &initial));
  if (begun == 2) TRY(input(context, 1, &sum.weights, &weight));
  for (size_t k = 0; k < sum.terms; k++) {
    TRY(input(context, joined ? begun : begun + k, &sum.gates[k], k ? &other : &gate));
    if (k && !equal(&other, &gate)) return refused("WeightedSum has gates of several shapes");
    TRY(input(context, first_feature + k, &sum.features[k], k ? &other : &feature));
    if (k && !equal(&other, &feature)) return refused("WeightedSum has features of several shapes");
  }
  const int64_t *sizes = feature.sizes, *gate_sizes = gate.sizes, *begun_sizes = initial.sizes;
  size_t gate_rank = gate.rank, begun_rank = initial.rank;
  if (feature.rank != 3 || gate_rank < 3 || gate_rank > 4 || gate_sizes[gate_rank - 3] != sizes[0] ||
      gate_sizes[gate_rank - 1] != sizes[2] || (size_t)gate_sizes[gate_rank - 2] < first + (joined ? sum.terms : 1) ||
      (!joined && gate_sizes[gate_rank - 2] != 1))
    return refused("WeightedSum has gates that do not fit its features");
  if (!begins_well(begun, &initial, &weight, &gate, &feature))
    return refused("WeightedSum begins with a value that does not fit its features");
  size_t rows = (size_t)gate_sizes[gate_rank - 2];
  for (size_t k = 0; k < sum.terms && joined; k++)
    sum.gates[k] += (first + k) * (size_t)sizes[2];
  sum.window = gate_rank == 4 ? (size_t)gate_sizes[0] : 1;
  sum.batch = (size_t)sizes[0], sum.tokens = (size_t)sizes[1], sum.channels = (size_t)sizes[2];
  sum.blocks = (sum.tokens + TOKENS - 1) / TOKENS;
  size_t sample = sum.tokens * sum.channels;
  sum.gate_sample = rows * sum.channels;
  sum.gate_step = sum.batch * sum.gate_sample;
  sum.sum_step = sum.batch * sample;
  sum.begun_rows = begun == 2 ? (size_t)begun_sizes[0] : begun ? sum.window : 0;
  sum.begun_step = begun_rank == 4 ? sum.sum_step : 0;
  sum.begun_sample = begun_rank == 4 || (begun_rank == 3 && begun_sizes[0] != 1) ? sample : 0;
  int64_t all[] = {(int64_t)sum.window, sizes[0], sizes[1], sizes[2]};
  Value *output;
  TRY(CALL(OUTPUT, context, (size_t)0, all + 4 - gate_rank, gate_rank, &output));
  TRY(CALL(TENSOR_DATA, output, &sum.sums));
  if (sum.window * sum.batch * sum.tokens * sum.channels == 0) return NULL;
  sum.past_cache = sum.window * sum.sum_step > CACHED && sum.channels % LANES == 0 &&
                   (uintptr_t)sum.sums % sizeof(Lanes) == 0; /* such stores must be aligned */
  return CALL(PARALLEL_FOR, context, add_up, sum.batch * sum.blocks, (size_t)0, &sum);
}

/* The kernel has no memory: its address holds the attributes, 4 * (first + 1) + begins. */
static Status *create(const Operator *operator, const Function *table, const void *info, void **kernel) {
  int64_t first, begins;
  (void)operator, (void)table;
  TRY(CALL(ATTRIBUTE_INT, info, "first", &first));
  TRY(CALL(ATTRIBUTE_INT, info, "begins", &begins));
  if (first < -1 || first > INT32_MAX / 8 || begins < 0 || begins > 2)
    return refused("WeightedSum has attributes out of range");
  *kernel = (void *)(intptr_t)(4 * (first + 1) + begins);
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
