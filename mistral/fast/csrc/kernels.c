/* Products of few rows with many weights, and a whole decode step, on a CPU; below is what each part is.

   Built once by fast/kernels.py, with whatever compiler is there, for the machine it runs on; called through
   ctypes. Plain C with the vector types that GCC and Clang share, so every instruction set is the
   compiler's affair. The arithmetic is that of model.py; tests compare the two.

   Every output is summed in one order, whatever the number of rows and of threads: LANES partial sums
   over the columns, then the sum of these. So a row's bits do not depend on what else is in the batch. */

#include "lanes.h" /* vectors of floats, the kinds of weights, a matrix, a layer and a model */

/* ---- products */

#include "floats.h"   /* with weights that are floats */
#include "blocks.h"   /* with weights of few bits, by kinds.h, unpack.h and (on Arm) arm_blocks.h */
#include "panels.h"   /* with such weights, of many rows */
#include "products.h" /* with weights of any kind */

/* ---- weights in another form */

#include "repack.h"   /* GGML's blocks, as files have them, to those of blocks.h */
#include "rounding.h" /* floats to int8 */
#include "affine.h"   /* floats to int4 */

/* ---- a decode step */

#include "keys.h"      /* keys and values as the cache keeps them */
#include "attention.h" /* a few queries, by parts of their positions */
#include "experts.h"   /* a router, and the chosen experts */
#include "decode.h"    /* all layers, in one call */

/* ---- prompts */

#include "tiles.h"   /* products of many rows with weights that are floats */
#include "queries.h" /* attention of many queries */
#include "rowwise.h" /* norms, rotations and gates of many rows */
