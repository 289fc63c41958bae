/* Batch normalisation of rows of channels (the channels-last layout), followed by ReLU or not.

Compiled by fused.py when it is first used: for bfloat16 with -DBF16, otherwise for float. The arithmetic is in float,
sums over many rows are in double. Every pass handles blocks of rows that fit into the first-level cache. A row of few
channels does not fill a vector register; so a block is handled in periods, each of several rows, with sums per element
of a period, which are added per channel at the end of the block. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { LANES = 32, BLOCK = 8192 };  /* elements of a register, at most; elements of a block, about */

#ifdef BF16
typedef uint16_t element;
static inline float load(element value) {
    uint32_t bits = (uint32_t)value << 16;
    float wide;
    memcpy(&wide, &bits, 4);
    return wide;
}
static inline element store(float value) { /* to nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (element)(value != value ? 0x7fc0 : rounded);
}
#else
typedef float element;
static inline float load(element value) { return value; }
static inline element store(float value) { return value; }
#endif

/* Loop over `count` elements, the first of which begins a period: element `at + j` is element j of its period. */
#define FOR_EACH(count)                                         \
    for (long at = 0, count_ = (count); at < count_; at += period) \
        for (long j = 0, length = count_ - at < period ? count_ - at : period; j < length; j++)

static void add(const element *restrict x, long count, long period, float *restrict sums) {
    memset(sums, 0, sizeof(float) * period);
    FOR_EACH(count) sums[j] += load(x[at + j]);
}

static void add_distances(const element *restrict x, long count, long period, const float *restrict centre,
                          float *restrict sums, float *restrict squares) {
    memset(sums, 0, sizeof(float) * period);
    memset(squares, 0, sizeof(float) * period);
    FOR_EACH(count) {
        float distance = load(x[at + j]) - centre[j];
        sums[j] += distance;
        squares[j] += distance * distance;
    }
}

static void normalise(const element *restrict x, element *restrict y, long count, long period,
                      const float *restrict scale, const float *restrict shift, float floor) {
    FOR_EACH(count) {
        float value = __builtin_fmaf(load(x[at + j]), scale[j], shift[j]);
        y[at + j] = store(value < floor ? floor : value); /* NaN stays NaN */
    }
}

/* The gradient before ReLU: `floor` is 0 with ReLU, otherwise minus infinity. */
static inline float masked(float gradient, float value, float scale, float shift, float floor) {
    return __builtin_fmaf(value, scale, shift) <= floor ? 0 : gradient;
}

static void add_gradients(const element *restrict g, const element *restrict x, long count, long period,
                          const float *restrict scale, const float *restrict shift, float floor,
                          const float *restrict mean, float *restrict sums, float *restrict products) {
    memset(sums, 0, sizeof(float) * period);
    memset(products, 0, sizeof(float) * period);
    FOR_EACH(count) {
        float value = load(x[at + j]), gradient = masked(load(g[at + j]), value, scale[j], shift[j], floor);
        sums[j] += gradient;
        products[j] += gradient * (value - mean[j]);
    }
}

static void input_gradients(const element *restrict g, const element *restrict x, element *restrict dx, long count,
                            long period, const float *restrict scale, const float *restrict shift, float floor,
                            const float *restrict slope, const float *restrict constant) {
    FOR_EACH(count) {
        float value = load(x[at + j]), gradient = masked(load(g[at + j]), value, scale[j], shift[j], floor);
        dx[at + j] = store(gradient * scale[j] + (value * slope[j] + constant[j]));
    }
}

typedef struct {
    long channels, period, rows; /* elements of a row, elements of a period, rows of a block */
    float *numbers[6];           /* each one number per element of a period */
    double *totals;              /* two numbers per channel */
} workspace;

static long divisor(long a, long b) { return b ? divisor(b, a % b) : a; }

static long smaller(long a, long b) { return a < b ? a : b; }

/* Allocate a workspace; returns whether there was enough memory. */
static int allocate(workspace *w, long channels) {
    long repeats = channels < 4 * LANES ? LANES / divisor(channels, LANES) : 1;
    w->channels = channels;
    w->period = channels * repeats;
    w->rows = repeats * (BLOCK / w->period > 8 ? BLOCK / w->period : 8);
    w->numbers[0] = malloc(sizeof(float) * 6 * w->period);
    w->totals = malloc(sizeof(double) * 2 * channels);
    for (int i = 1; i < 6; i++) w->numbers[i] = w->numbers[0] + i * w->period;
    return w->numbers[0] && w->totals;
}

static void release(workspace *w) {
    free(w->numbers[0]);
    free(w->totals);
}

/* Repeat the number of each channel over the period. */
static void repeat(const workspace *w, const float *values, float *over) {
    for (long j = 0; j < w->period; j += w->channels) memcpy(over + j, values, sizeof(float) * w->channels);
}

/* Add the numbers of a period to the totals of their channels. */
static void collect(const workspace *w, const float *sums, double *totals) {
    for (long j = 0; j < w->period; j += w->channels)
        for (long c = 0; c < w->channels; c++) totals[c] += sums[j + c];
}

/* Mean and variance (of the population) of each channel, from distances to the mean of the first block. */
static void moments(workspace *w, const element *x, long rows, double *means, double *variances) {
    long channels = w->channels, first = smaller(w->rows, rows);
    float *centre = w->numbers[0], *sums = w->numbers[1], *squares = w->numbers[2];
    double *total = w->totals, *total_squares = w->totals + channels;
    memset(total, 0, sizeof(double) * 2 * channels);
    add(x, first * channels, w->period, sums);
    collect(w, sums, total);
    for (long j = 0; j < w->period; j++) centre[j] = (float)(total[j % channels] / first);
    memset(total, 0, sizeof(double) * channels);
    for (long row = 0; row < rows; row += w->rows) {
        long count = smaller(w->rows, rows - row);
        add_distances(x + row * channels, count * channels, w->period, centre, sums, squares);
        collect(w, sums, total);
        collect(w, squares, total_squares);
    }
    for (long c = 0; c < channels; c++) {
        double distance = total[c] / rows;
        means[c] = centre[c] + distance;
        variances[c] = total_squares[c] / rows - distance * distance;
    }
}

/* y = scale x + shift, or ReLU of it, with scale = weight / sqrt(variance + eps) and shift = bias - scale mean.

x, y: rows of `channels` elements. weight, bias: one number per channel, or null for 1 and 0. means, variances:
results, per channel. saved: results for `backward`: scale, shift, mean and 1 / sqrt(variance + eps) per channel.
Returns whether there was enough memory. */
int forward(const element *x, element *y, long rows, long channels, const float *weight, const float *bias, double eps,
            int relu, double *means, double *variances, float *saved) {
    workspace w;
    int allocated = allocate(&w, channels);
    if (allocated) {
        moments(&w, x, rows, means, variances);
        for (long c = 0; c < channels; c++) {
            double inverse = 1 / __builtin_sqrt(variances[c] + eps), scale = weight ? weight[c] * inverse : inverse;
            saved[c] = (float)scale;
            saved[channels + c] = (float)((bias ? bias[c] : 0) - means[c] * scale);
            saved[2 * channels + c] = (float)means[c];
            saved[3 * channels + c] = (float)inverse;
        }
        repeat(&w, saved, w.numbers[0]);
        repeat(&w, saved + channels, w.numbers[1]);
        normalise(x, y, rows * channels, w.period, w.numbers[0], w.numbers[1], relu ? 0 : -__builtin_inff());
    }
    release(&w);
    return allocated;
}

/* Gradients with respect to x, weight and bias, from the gradient g with respect to y:

dx = scale (g - mean(g) - (x - mean) mean(g (x - mean)) / (variance + eps)) = scale g + slope x + constant

g, x, dx: rows of `channels` elements. saved: results of `forward`. dweight, dbias: results, per channel.
Returns whether there was enough memory. */
int backward(const element *g, const element *x, element *dx, long rows, long channels, int relu, const float *saved,
             float *dweight, float *dbias) {
    workspace w;
    int allocated = allocate(&w, channels);
    if (allocated) {
        const float *mean = saved + 2 * channels, *inverse = saved + 3 * channels;
        float *scales = w.numbers[0], *shifts = w.numbers[1], floor = relu ? 0 : -__builtin_inff();
        double *total = w.totals, *products = w.totals + channels;
        repeat(&w, saved, scales);
        repeat(&w, saved + channels, shifts);
        repeat(&w, mean, w.numbers[2]);
        memset(total, 0, sizeof(double) * 2 * channels);
        for (long row = 0; row < rows; row += w.rows) {
            long count = smaller(w.rows, rows - row);
            add_gradients(g + row * channels, x + row * channels, count * channels, w.period, scales, shifts, floor,
                          w.numbers[2], w.numbers[3], w.numbers[4]);
            collect(&w, w.numbers[3], total);
            collect(&w, w.numbers[4], products);
        }
        float *slopes = w.numbers[2], *constants = w.numbers[3];
        for (long c = 0; c < channels; c++) {
            double slope = -saved[c] * products[c] / rows * inverse[c] * inverse[c];
            dbias[c] = (float)total[c];
            dweight[c] = (float)(products[c] * inverse[c]);
            w.numbers[4][c] = (float)slope;
            w.numbers[5][c] = (float)(-saved[c] * total[c] / rows - slope * mean[c]);
        }
        repeat(&w, w.numbers[4], slopes);
        repeat(&w, w.numbers[5], constants);
        input_gradients(g, x, dx, rows * channels, w.period, scales, shifts, floor, slopes, constants);
    }
    release(&w);
    return allocated;
}
