/* The inner loop of GPTQ and of coordinate descent: a code for each weight of a few columns, each
   taken after the errors of the columns before it have pulled at it.

   gptq.py calls this through ctypes and has it in NumPy for machines without a compiler. Rows do
   not depend on each other, so that LANES of them are done at once, turned into columns meanwhile. */

#include <math.h>
#include <stddef.h>
#include <stdint.h>

#include "cpu.h"

#define LANES 16
#define MOST_COLUMNS 64 /* gptq.py: BLOCK_COLUMNS */

typedef float Tile[MOST_COLUMNS][LANES];

/* Rows of a matrix as columns of a tile; lanes without a row stay as they are. */
INLINE void turn_in(Tile tile, const float *matrix, size_t stride, size_t rows, size_t count) {
    for (size_t row = 0; row < rows; row++)
        for (size_t j = 0; j < count; j++) tile[j][row] = matrix[row * stride + j];
}

/* And back. Row by row: rows often lie a multiple of a page apart, where few fit into a cache. */
INLINE void turn_out(Tile tile, float *matrix, size_t stride, size_t rows, size_t count) {
    for (size_t row = 0; row < rows; row++)
        for (size_t j = 0; j < count; j++) matrix[row * stride + j] = tile[j][row];
}

/* The nearest levels' numbers; without levels a code is its own level. */
INLINE void find_codes(const float *positions, const float *levels, int top, float *codes) {
    if (!levels) {
        for (size_t i = 0; i < LANES; i++) {
            float whole = rintf(positions[i]);
            whole = whole > 0 ? whole : 0;
            codes[i] = whole < (float)top ? whole : (float)top;
        }
        return;
    }
    for (size_t i = 0; i < LANES; i++) codes[i] = 0;
    for (int code = 0; code < top; code++)
        for (size_t i = 0; i < LANES; i++)
            codes[i] += 2 * positions[i] > levels[code] + levels[code + 1] ? 1.0f : 0.0f;
}

/* Columns 0 .. count, MOST_COLUMNS at most, of weights, errors, pull and codes, each row `stride`
   items after the one before; coefficients [count][stride], deltas [rows][count]; steps and origins
   [rows][group_count]; groups and stretch [count]. The value of a code in column j is
   (origin + step * level) / stretch[j]. Of `pull` only these columns are read, none is written. */
EACH_CPU void phiship_feedback(
    size_t rows, size_t count, size_t stride, const float *weights, float *errors,
    const float *pull, const float *coefficients, const int32_t *groups, size_t group_count,
    const float *steps, const float *origins, const float *stretch, const float *levels, int top,
    uint8_t *codes, float *deltas) {
    Tile weight = {{0}}, error = {{0}}, pulled = {{0}}, code, delta;
    for (size_t first = 0; first < rows; first += LANES) {
        size_t here = rows - first < LANES ? rows - first : LANES, start = first * stride;
        turn_in(weight, weights + start, stride, here, count);
        turn_in(error, errors + start, stride, here, count);
        turn_in(pulled, pull + start, stride, here, count);
        for (size_t j = 0; j < count; j++) {
            float step[LANES] = {0}, origin[LANES] = {0}, position[LANES], level[LANES];
            float inverse = 1 / stretch[j];
            for (size_t i = 0; i < here; i++) {
                step[i] = steps[(first + i) * group_count + groups[j]];
                origin[i] = origins[(first + i) * group_count + groups[j]];
            }
            for (size_t i = 0; i < LANES; i++) {
                float wanted = (weight[j][i] + pulled[j][i]) * stretch[j];
                position[i] = step[i] != 0 ? (wanted - origin[i]) / step[i] : 0;
            }
            find_codes(position, levels, top, code[j]);
            for (size_t i = 0; i < LANES; i++)
                level[i] = levels ? levels[(int)code[j][i]] : code[j][i];
            for (size_t i = 0; i < LANES; i++) {
                float left = weight[j][i] - (origin[i] + step[i] * level[i]) * inverse;
                delta[j][i] = left - error[j][i];
                error[j][i] = left;
            }
            for (size_t k = j + 1; k < count; k++) {
                float coefficient = coefficients[j * stride + k];
                for (size_t i = 0; i < LANES; i++) pulled[k][i] += delta[j][i] * coefficient;
            }
        }
        turn_out(error, errors + start, stride, here, count);
        turn_out(delta, deltas + first * count, count, here, count);
        for (size_t row = 0; row < here; row++)
            for (size_t j = 0; j < count; j++)
                codes[start + row * stride + j] = (uint8_t)code[j][row];
    }
}
