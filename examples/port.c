/* GPT-Neo and GPT-NeoX in one file of C: a worked example of a port that test vectors check.

       python compare.py --vectors vectors                  small checkpoints, and what is right
       cc -O2 -o port examples/port.c -lm
       ./port vectors answers                               what this file computes
       python compare.py --check-vectors vectors answers    a table, and a mistake by its name

   `make port` does all four.  The file needs a C11 compiler, a POSIX mkdir and a little-endian
   machine with IEEE floats.  It is written to be read: it is not fast, and memory is never given
   back, since a whole run takes a few megabytes.

   Read it in this order: Model (what a checkpoint holds), `forward` (the way from ids to logits),
   `block`, `project` and `attend` (where most mistakes are made), then the small functions above
   them.  `answer_case` shows what a port answers.  The rest reads and writes files.

       T  new tokens                   H  heads
       S  tokens in view, S >= T       D  width of a head, C / H
       C  width of the model           R  rotated dims of a head (GPT-NeoX)
       V  vocabulary (rows)            W  window of a local layer (GPT-Neo)
       I  inner width of the MLP       L  layers

   A tensor (T, C) is an array of T * C floats, row after row. */

#define _POSIX_C_SOURCE 200809L
#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

/* ---- What a checkpoint holds ---------------------------------------------------------------- */

typedef struct {
    const float *weight, *bias;         /* matrix: (out, in) and (out); norm: (C) and (C) */
    int in, out;                        /* bias is NULL where there is none */
} Part;

typedef struct {
    Part ln_1, ln_2;
    Part q, k, v;                       /* GPT-Neo: three matrices */
    Part qkv;                           /* GPT-NeoX: one, which holds [q k v] of each head */
    Part out, up, down;
    int window;                         /* W, or 0: sees all that came before */
    float *keys, *values;               /* the cache: (P, C) each, one row for each position */
} Layer;

typedef struct {
    int neox, V, C, H, D, I, L, R, P;   /* P: positions, the most tokens of a text */
    int parallel, exact_gelu;
    float eps, rotary_base;
    const float *embed, *pos_embed;     /* (V, C); (P, C), GPT-Neo only */
    Part ln_f, head;
    Layer *layers;
} Model;

static void fail(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fputs("port: ", stderr);
    vfprintf(stderr, format, arguments);
    fputs("\n", stderr);
    va_end(arguments);
    exit(1);
}

static void *take(size_t count, size_t size) {
    void *memory = calloc(count ? count : 1, size);
    if (!memory) fail("out of memory");
    return memory;
}

static float *floats(size_t count) { return take(count, sizeof(float)); }

/* ---- The model ------------------------------------------------------------------------------ */

static void linear(const Part *m, const float *x, float *y, int T) {     /* (T, in) -> (T, out) */
    for (int t = 0; t < T; t++)
        for (int o = 0; o < m->out; o++) {
            float sum = m->bias ? m->bias[o] : 0;
            for (int i = 0; i < m->in; i++) sum += x[t * m->in + i] * m->weight[o * m->in + i];
            y[t * m->out + o] = sum;
        }
}

static void norm(const Model *m, const Part *n, const float *x, float *y, int T) {
    int C = m->C;                                                          /* (T, C) -> (T, C) */
    for (int t = 0; t < T; t++, x += C, y += C) {
        float mean = 0, variance = 0;
        for (int c = 0; c < C; c++) mean += x[c] / C;
        for (int c = 0; c < C; c++) variance += (x[c] - mean) * (x[c] - mean) / C;
        float scale = 1 / sqrtf(variance + m->eps);
        for (int c = 0; c < C; c++) y[c] = (x[c] - mean) * scale * n->weight[c] + n->bias[c];
    }
}

static float gelu(const Model *m, float x) {
    if (m->exact_gelu) return 0.5f * x * (1 + erff(x * 0.70710678f));
    return 0.5f * x * (1 + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
}

/* Turn the first R dims of one head (D) by its position; pair i is dims (i, i + R/2). */
static void rotate(const Model *m, float *x, int position) {
    int half = m->R / 2;
    for (int i = 0; i < half; i++) {
        float angle = position / powf(m->rotary_base, 2.0f * i / m->R);
        float a = x[i], b = x[i + half];
        x[i] = a * cosf(angle) - b * sinf(angle);
        x[i + half] = b * cosf(angle) + a * sinf(angle);
    }
}

/* x (T, C) -> q (T, C); keys and values go into rows past ... past + T - 1 of the cache. */
static void project(const Model *m, Layer *layer, const float *x, float *q, int T, int past) {
    int C = m->C, D = m->D;
    float *k = layer->keys + past * C, *v = layer->values + past * C;
    if (!m->neox) {
        linear(&layer->q, x, q, T), linear(&layer->k, x, k, T), linear(&layer->v, x, v, T);
        return;
    }
    float *qkv = floats((size_t)T * 3 * C), *parts[3] = {q, k, v};
    linear(&layer->qkv, x, qkv, T);
    for (int t = 0; t < T; t++)
        for (int h = 0; h < m->H; h++) {
            for (int part = 0; part < 3; part++)        /* q, k, v of a head lie side by side */
                memcpy(parts[part] + t * C + h * D, qkv + t * 3 * C + h * 3 * D + part * D,
                       D * sizeof(float));
            rotate(m, q + t * C + h * D, past + t);
            rotate(m, k + t * C + h * D, past + t);
        }
}

/* q (T, C) and the cache -> y (T, C): the mean of the values, weighted by the softmax of q k. */
static void attend(const Model *m, const Layer *layer, const float *q, float *y, int T, int past) {
    int C = m->C, D = m->D;
    float *weights = floats(past + T);
    float scale = m->neox ? 1 / sqrtf(D) : 1;                   /* GPT-Neo was trained without it */
    for (int t = 0; t < T; t++)
        for (int h = 0; h < m->H; h++) {
            int self = past + t, first = 0;
            if (layer->window && self >= layer->window) first = self - layer->window + 1;
            float largest = -INFINITY, sum = 0;
            for (int s = first; s <= self; s++) {
                float score = 0;
                for (int d = 0; d < D; d++)
                    score += q[t * C + h * D + d] * layer->keys[s * C + h * D + d];
                weights[s] = score * scale;
                largest = fmaxf(largest, weights[s]);
            }
            for (int s = first; s <= self; s++) sum += weights[s] = expf(weights[s] - largest);
            for (int d = 0; d < D; d++) {
                float mean = 0;
                for (int s = first; s <= self; s++)
                    mean += weights[s] / sum * layer->values[s * C + h * D + d];
                y[t * C + h * D + d] = mean;
            }
        }
}

/* x (T, C), changed in place.  In parallel the MLP reads what the attention reads. */
static void block(const Model *m, Layer *layer, float *x, int T, int past) {
    int n = T * m->C;
    float *h = floats(n), *q = floats(n), *y = floats(n), *a = floats(n);
    float *inner = floats((size_t)T * m->I);
    norm(m, &layer->ln_1, x, h, T);
    project(m, layer, h, q, T, past);
    attend(m, layer, q, y, T, past);
    linear(&layer->out, y, a, T);
    if (m->parallel) norm(m, &layer->ln_2, x, h, T);
    for (int i = 0; i < n; i++) x[i] += a[i];
    if (!m->parallel) norm(m, &layer->ln_2, x, h, T);
    linear(&layer->up, h, inner, T);
    for (int i = 0; i < T * m->I; i++) inner[i] = gelu(m, inner[i]);
    linear(&layer->down, inner, a, T);
    for (int i = 0; i < n; i++) x[i] += a[i];
}

/* ids (T) after `past` tokens that are in the cache -> logits (T, V).
   hidden (L + 1, T, C), or NULL: what each block reads, and last what the final norm returns. */
static void forward(Model *m, const int *ids, int T, int past, float *hidden, float *logits) {
    int C = m->C, n = T * C;
    if (past + T > m->P) fail("%d tokens are more than the %d positions", past + T, m->P);
    float *x = floats(n), *normed = floats(n);
    for (int t = 0; t < T; t++) {
        if (ids[t] < 0 || ids[t] >= m->V) fail("id %d is not in the vocabulary", ids[t]);
        for (int c = 0; c < C; c++) {
            x[t * C + c] = m->embed[ids[t] * C + c];
            if (!m->neox) x[t * C + c] += m->pos_embed[(past + t) * C + c];
        }
    }
    for (int l = 0; l < m->L; l++) {
        if (hidden) memcpy(hidden + l * n, x, n * sizeof(float));
        block(m, &m->layers[l], x, T, past);
    }
    norm(m, &m->ln_f, x, normed, T);
    if (hidden) memcpy(hidden + m->L * n, normed, n * sizeof(float));
    linear(&m->head, normed, logits, T);
}

/* ids (T + count) has T ids at first; the likeliest that follow are put behind them. */
static void greedy(Model *m, int *ids, int T, int count, int cached) {
    float *logits = floats((size_t)(T + count) * m->V);
    for (int end = T, done = 0; end < T + count; end++) {
        forward(m, ids + done, end - done, done, NULL, logits);
        const float *last = logits + (size_t)(end - done - 1) * m->V;
        int best = 0;
        for (int v = 1; v < m->V; v++)
            if (last[v] > last[best]) best = v;
        ids[end] = best;
        if (cached) done = end;                        /* otherwise everything is computed anew */
    }
}

/* ---- JSON -----------------------------------------------------------------------------------

   It is read where it lies: a value is a pointer to its first character. */

static const char *skip(const char *s) { return s + strspn(s, " \t\r\n,:"); }

static const char *end_of(const char *s) {                          /* what stands behind a value */
    if (*s == '"') {
        for (s++; *s && *s != '"'; s++)
            if (*s == '\\' && s[1]) s++;
        return *s ? s + 1 : s;
    }
    if (*s == '{' || *s == '[') {
        char close = *s + 2;                            /* ] and } are two after [ and { */
        for (s = skip(s + 1); *s && *s != close;) s = skip(end_of(s));
        return *s ? s + 1 : s;
    }
    size_t length = strcspn(s, " \t\r\n,:]}");
    return s + (length ? length : *s != 0);
}

/* Each value of a list, or each key and each value of an object; NULL behind the last. */
static const char *here(const char *s) { return *s && !strchr("]}", *s) ? s : NULL; }
static const char *first(const char *list) { return here(skip(list + 1)); }
static const char *next(const char *s) { return here(skip(end_of(s))); }

static char *text_of(const char *s) {                               /* "" where s is no string */
    size_t length = *s == '"' ? end_of(s) - s : 0;
    return length > 2 ? memcpy(take(length, 1), s + 1, length - 2) : take(1, 1);
}

static const char *find(const char *object, const char *key) {      /* its value, or NULL */
    const char *value;
    for (const char *name = first(object); name && (value = next(name)); name = next(value))
        if (!strcmp(text_of(name), key)) return value;
    return NULL;
}

/* The value of a key that must be there, and must begin with a character of `kind`. */
static const char *get(const char *object, const char *key, const char *kind) {
    const char *value = find(object, key);
    if (!value || !strchr(kind, *value)) fail("\"%s\" is missing, or of another kind", key);
    return value;
}

static double number(const char *object, const char *key) {
    return strtod(get(object, key, "-0123456789"), NULL);
}

static int whole(const char *object, const char *key) { return (int)number(object, key); }
static int yes(const char *object, const char *key) { return *get(object, key, "tf") == 't'; }
static char *word(const char *object, const char *key) { return text_of(get(object, key, "\"")); }

static int *integers(const char *list, int *count) {                /* -> (count) */
    int *all = take(strlen(list), sizeof(int));
    *count = 0;
    for (const char *s = first(list); s; s = next(s)) all[(*count)++] = (int)strtol(s, NULL, 10);
    return all;
}

/* ---- Files ---------------------------------------------------------------------------------- */

static char *name_of(const char *format, ...) {
    va_list arguments;
    char *name = take(4096, 1);
    va_start(arguments, format);
    if (vsnprintf(name, 4096, format, arguments) >= 4096) fail("%s... is too long a name", name);
    va_end(arguments);
    return name;
}

static char *read_file(const char *path, size_t *size) {            /* with a zero behind its end */
    FILE *file = fopen(path, "rb");
    if (!file || fseek(file, 0, SEEK_END)) fail("%s cannot be read", path);
    *size = ftell(file);
    rewind(file);
    char *content = take(*size + 1, 1);
    if (fread(content, 1, *size, file) != *size) fail("%s cannot be read", path);
    fclose(file);
    return content;
}

static const char *read_json(const char *path) {                    /* the object in the file */
    size_t size;
    const char *text = skip(read_file(path, &size));
    if (*text != '{') fail("%s is not valid JSON", path);
    return text;
}

static int *read_ids(const char *path, int *T) {                    /* .npy of int64 -> (T) */
    size_t size;
    char *content = read_file(path, &size), *header = content + 10;
    size_t begin = size < 10 ? size : 10 + (size_t)(unsigned char)content[8]
                                      + 256 * (size_t)(unsigned char)content[9];
    if (begin >= size || memcmp(content, "\x93NUMPY", 6) || !strstr(header, "'<i8'"))
        fail("%s is not a .npy file of int64", path);
    *T = (int)((size - begin) / 8);
    int *ids = take(*T, sizeof(int));
    for (int t = 0; t < *T; t++) {
        int64_t id;
        memcpy(&id, content + begin + 8 * t, 8);
        ids[t] = (int)id;
    }
    return ids;
}

static void write_npy(const char *path, const float *x, int rows, int columns) {
    FILE *file = fopen(path, "wb");
    if (!file) fail("%s cannot be written", path);
    size_t count = (size_t)rows * columns;
    char *about = name_of("{'descr': '<f4', 'fortran_order': False, 'shape': (%d, %d), }",
                          rows, columns);
    fwrite("\x93NUMPY\x01\x00\x76\x00", 1, 10, file);  /* 0x76 bytes follow: 128 with these 10 */
    fprintf(file, "%-117s\n", about);
    if (fwrite(x, sizeof(float), count, file) != count || fclose(file))
        fail("%s cannot be written", path);
}

/* ---- A checkpoint --------------------------------------------------------------------------- */

typedef struct {
    const char *path, *data;            /* the numbers of all tensors */
    size_t size;                        /* of the data, in bytes */
    const char *header;                 /* {name: {dtype, shape, data_offsets}} */
} Tensors;

static Tensors open_tensors(const char *path) {
    Tensors file = {.path = path};
    char *content = read_file(path, &file.size);
    uint64_t length = 0;
    if (file.size > 8) memcpy(&length, content, 8);
    if (length == 0 || length > file.size - 8) fail("%s is not a .safetensors file", path);
    file.header = memcpy(take(length + 1, 1), content + 8, length);
    file.data = content + 8 + length;
    file.size -= 8 + length;
    return file;
}

/* A tensor (rows, columns), or (rows) where columns is 0. */
static const float *tensor(const Tensors *file, int rows, int columns, const char *name) {
    const char *about = find(file->header, name);
    if (!about) fail("%s has no %s", file->path, name);
    if (strcmp(word(about, "dtype"), "F32")) fail("%s is not float32", name);
    int dims, ends, *shape = integers(get(about, "shape", "["), &dims);
    int *offsets = integers(get(about, "data_offsets", "["), &ends);
    size_t count = (size_t)rows * (columns ? columns : 1);
    if (dims != (columns ? 2 : 1) || shape[0] != rows || (columns && shape[1] != columns))
        fail("%s: %s has another shape", file->path, name);
    if (ends != 2 || offsets[0] < 0 || (size_t)offsets[0] + 4 * count != (size_t)offsets[1]
        || (size_t)offsets[1] > file->size)
        fail("%s: %s does not lie in the file", file->path, name);
    return memcpy(floats(count), file->data + offsets[0], 4 * count);           /* aligned */
}

/* A matrix (out, in); or, where in is 0, the weights of a norm (out). */
static Part part(const Tensors *file, const char *where, const char *name, int in, int out,
                 int bias) {
    const float *b = bias ? tensor(file, out, 0, name_of("%s%s.bias", where, name)) : NULL;
    return (Part){in ? tensor(file, out, in, name_of("%s%s.weight", where, name))
                     : tensor(file, out, 0, name_of("%s%s.weight", where, name)), b, in, out};
}

/* GPT-Neo's "attention_types" is [[kinds, repetitions], ...]. */
static void set_windows(Model *m, const char *config) {
    int l = 0, W = whole(config, "window_size");
    for (const char *pair = first(get(config, "attention_types", "[")); pair; pair = next(pair)) {
        const char *kinds = first(pair), *times = kinds ? next(kinds) : NULL;
        for (int n = times ? (int)strtol(times, NULL, 10) : 0; n > 0; n--)
            for (const char *kind = first(kinds); kind && l < m->L; kind = next(kind))
                m->layers[l++].window = !strcmp(text_of(kind), "local") ? W : 0;
    }
    if (l != m->L) fail("attention_types has %d layers, not %d", l, m->L);
}

enum { EMBED, LAYER, LN_1, LN_2, OUT, UP, DOWN, LN_F, HEAD, NAMES };
static const char *names_of[2][NAMES] = {
    {"transformer.wte", "transformer.h.%d.", "ln_1", "ln_2", "attn.attention.out_proj", "mlp.c_fc",
     "mlp.c_proj", "transformer.ln_f", "lm_head"},
    {"gpt_neox.embed_in", "gpt_neox.layers.%d.", "input_layernorm", "post_attention_layernorm",
     "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h", "gpt_neox.final_layer_norm",
     "embed_out"}};

static Model read_config(const char *config) {
    Model m = {.neox = !strcmp(word(config, "model_type"), "gpt_neox")};
    const char *act = word(config, m.neox ? "hidden_act" : "activation_function");
    m.exact_gelu = !strcmp(act, "gelu");       /* gelu_new, gelu_fast, gelu_pytorch_tanh are one */
    m.eps = (float)number(config, m.neox ? "layer_norm_eps" : "layer_norm_epsilon");
    m.V = whole(config, "vocab_size"), m.C = whole(config, "hidden_size");
    m.H = whole(config, m.neox ? "num_attention_heads" : "num_heads"), m.D = m.C / m.H;
    m.L = whole(config, m.neox ? "num_hidden_layers" : "num_layers");
    m.I = whole(config, "intermediate_size"), m.P = whole(config, "max_position_embeddings");
    m.layers = take(m.L, sizeof(Layer));
    if (!m.neox) {
        set_windows(&m, config);
        return m;
    }
    m.R = (int)(m.D * number(config, "rotary_pct"));
    m.rotary_base = (float)number(config, "rotary_emb_base");
    m.parallel = yes(config, "use_parallel_residual");
    return m;
}

static Model load(const char *folder) {
    const char *config = read_json(name_of("%s/config.json", folder));
    Model m = read_config(config);
    Tensors file = open_tensors(name_of("%s/model.safetensors", folder));
    const char **names = names_of[m.neox];
    int C = m.C, bias = m.neox ? yes(config, "attention_bias") : 1;
    m.embed = part(&file, "", names[EMBED], C, m.V, 0).weight;
    if (!m.neox) m.pos_embed = part(&file, "", "transformer.wpe", C, m.P, 0).weight;
    for (int l = 0; l < m.L; l++) {
        Layer *layer = &m.layers[l];
        char *where = name_of(names[LAYER], l);
        layer->keys = floats((size_t)m.P * C), layer->values = floats((size_t)m.P * C);
        layer->ln_1 = part(&file, where, names[LN_1], 0, C, 1);
        layer->ln_2 = part(&file, where, names[LN_2], 0, C, 1);
        layer->out = part(&file, where, names[OUT], C, C, bias);
        layer->up = part(&file, where, names[UP], C, m.I, 1);
        layer->down = part(&file, where, names[DOWN], m.I, C, 1);
        if (m.neox) {
            layer->qkv = part(&file, where, "attention.query_key_value", C, 3 * C, bias);
            continue;
        }
        layer->q = part(&file, where, "attn.attention.q_proj", C, C, 0);
        layer->k = part(&file, where, "attn.attention.k_proj", C, C, 0);
        layer->v = part(&file, where, "attn.attention.v_proj", C, C, 0);
    }
    m.ln_f = part(&file, "", names[LN_F], 0, C, 1);
    m.head = (Part){m.embed, NULL, C, m.V};                     /* tied: the embedding once more */
    if (!yes(config, "tie_word_embeddings")) m.head = part(&file, "", names[HEAD], C, m.V, 0);
    return m;
}

/* ---- The answers ---------------------------------------------------------------------------- */

/* The ids that follow the prompt, first without the cache and then with it. */
static void answer_greedy(Model *m, const char *folder, const char *answers) {
    const char *task = read_json(name_of("%s/greedy.json", folder));
    FILE *file = fopen(name_of("%s/greedy.json", answers), "w");
    if (!file) fail("%s cannot be written", answers);
    for (int cached = 0; cached < 2; cached++) {
        int T, count, *prompt = integers(get(task, "prompt", "["), &T);
        integers(get(task, "continuation", "["), &count);
        int *ids = memcpy(take(T + count, sizeof(int)), prompt, T * sizeof(int));
        greedy(m, ids, T, count, cached);
        fputs(cached ? ", \"cached_continuation\": [" : "{\"continuation\": [", file);
        for (int i = T; i < T + count; i++) fprintf(file, "%s%d", i > T ? ", " : "", ids[i]);
        fputs("]", file);
    }
    fputs("}\n", file);
    fclose(file);
}

static void answer_case(const char *folder, const char *answers) {
    int T;
    Model m = load(folder);
    int *ids = read_ids(name_of("%s/npy/input_ids.npy", folder), &T);
    float *hidden = floats((size_t)(m.L + 1) * T * m.C), *logits = floats((size_t)T * m.V);
    mkdir(answers, 0755);
    forward(&m, ids, T, 0, hidden, logits);
    write_npy(name_of("%s/logits.npy", answers), logits, T, m.V);
    for (int i = 0; i <= m.L; i++)
        write_npy(name_of("%s/hidden_states.%d.npy", answers, i), hidden + (size_t)i * T * m.C, T,
                  m.C);
    for (int t = 0; t < T; t++) forward(&m, ids + t, 1, t, NULL, logits + (size_t)t * m.V);
    write_npy(name_of("%s/cached_logits.npy", answers), logits, T, m.V);
    answer_greedy(&m, folder, answers);
}

int main(int count, char **arguments) {
    if (count != 3) fail("usage: port VECTORS ANSWERS");
    const char *about = read_json(name_of("%s/vectors.json", arguments[1]));
    mkdir(arguments[2], 0755);
    for (const char *key = first(get(about, "cases", "{")); key; key = next(next(key))) {
        const char *name = text_of(key);
        answer_case(name_of("%s/%s", arguments[1], name), name_of("%s/%s", arguments[2], name));
    }
    return 0;
}
