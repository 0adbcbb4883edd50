// recall.c: generates the recall task as shards of word tokens. The task asks for things that a document
// named earlier.
//
//   Remember Mara : lamp .        stores the thing "lamp" under the name "Mara"; a later Remember replaces it
//   Recall Mara : lamp .          asks for the newest thing of "Mara"; "lamp" is the answer to predict
//   soon far below .              filler
//
// Each line above is a sentence of four tokens; "Mara :" is one token. A statement is a Remember or a Recall.
// A document has seq_len + 1 tokens. Its first token is end-of-text; its last sentence may be cut off.
//
// A Recall draws a distance log-uniformly and asks for the name whose last statement is closest to that
// distance. The names are few and asked often, so a long distance to a last statement would be rare. Two
// kinds of names provide long distances in every document:
//   delayed:  a Remember in the first quarter of the document and a Recall in the last, no statement between;
//   periodic: a Recall every period/2 to period tokens. The periods are seq_len/2, seq_len/4, ...
// data/README.md has all rules and the file formats.
#include "../llmc/shard.h"
#include "../llmc/rand.h"
#include "../llmc/tokenizer.h"
#include <signal.h>
#include <dirent.h>

enum { EOT, REMEMBER, RECALL, PERIOD, FIRST_NAME };
enum { SENTENCE_TOKENS = 4, THING_OFFSET = 2 }; // THING_OFFSET: index of the thing in a statement
enum { FILLER_WORDS = SENTENCE_TOKENS - 1 };
#define FILLER_FRACTION 0.1       // of all sentences
#define RECALL_FRACTION 0.8       // of all statements
#define MIN_REMEMBER_FRACTION 0.1 // of the statements about names that are neither delayed nor periodic
enum { MIN_PERIOD = 64 };         // tokens
#define MAX_SHARD_TOKENS 100000000
#define BUCKETS 18             // bucket k counts distances from 2^k to 2^(k+1) - 1
#define FIRST_FILLED_BUCKET 5  // the validation documents fill the buckets from this one on
#define MIN_BUCKET_ANSWERS 400 // answers of a filled bucket
#define MIN_VAL_DOCS 128
#define MAX_VAL_DOCS 4096

static const char *const NAMES[16] = {"Mara",  "Tomas", "Ines",  "Pavel", "Ruth",  "Omar",  "Lena", "Hugo",
                                      "Nadia", "Felix", "Clara", "Ivan",  "Greta", "Simon", "Yara", "Bruno"};
static const char *const THINGS[16] = {"lamp", "key",  "drum", "coat",  "bell",  "rope",  "book",  "cup",
                                       "ring", "boot", "map",  "flute", "clock", "sword", "shell", "basket"};
static const char *const FILLERS[32] = {
    "then",  "soon",  "far",   "below", "rain", "came",   "over", "hills", "some",  "birds", "sang",
    "and",   "wind",  "moved", "trees", "slow", "clouds", "went", "by",    "night", "fell",  "on",
    "quiet", "roads", "while", "snow",  "lay",  "deep",   "near", "old",   "stone", "walls"};

typedef struct {
    int64_t seq_len;
    int64_t train_docs;
    int64_t val_docs; // 0: as many as the buckets need
    int64_t seed;
    int64_t names, things, fillers; // vocabulary: words of each kind
} RecallConfig;

// One document and the state of its generator. A position is the index of a token in the document.
typedef struct {
    int32_t *tokens; // [seq_len + 1]
    int64_t length;  // seq_len + 1
    int64_t count;   // tokens generated so far
    Answer *answers; // [answer_count] with positions as indices; at most one in SENTENCE_TOKENS tokens
    int64_t answer_count;
    int32_t *thing_token; // [names] the newest thing of each name
    int64_t *thing_pos;   // [names] position of the thing in the last statement about the name; -1: none
    int64_t *due_pos;     // [names] where a delayed or periodic name becomes due for a statement; -1: never
    int64_t *period;      // [names] of a periodic name; 0 for the others
    int64_t *permutation; // [names] the names in random order: delayed names, periodic names, other names
} Document;

// Appends a token. A full document ignores it.
static void append_token(Document *d, int32_t token) {
    if (d->count < d->length) d->tokens[d->count++] = token;
}

// Appends a statement about a name, and its answer if the verb is RECALL.
static void append_statement(Document *d, int verb, int64_t name) {
    int64_t pos = d->count + THING_OFFSET;
    if (verb == RECALL && pos < d->length) {
        d->answers[d->answer_count].index = pos;
        d->answers[d->answer_count++].distance = pos - d->thing_pos[name];
    }
    append_token(d, verb);
    append_token(d, (int32_t)(FIRST_NAME + name));
    append_token(d, d->thing_token[name]);
    append_token(d, PERIOD);
    d->thing_pos[name] = pos;
}

// Draws a new thing for the name and appends its Remember statement.
static void append_remember(Document *d, const RecallConfig *c, Rng *r, int64_t name) {
    d->thing_token[name] = (int32_t)(FIRST_NAME + c->names + rng_below(r, c->things));
    append_statement(d, REMEMBER, name);
}

static int64_t min_of(int64_t a, int64_t b) {
    return a < b ? a : b;
}

// Returns the first name of permutation[begin, end) whose due position is reached, or -1.
static int64_t find_due_name(const Document *d, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
        int64_t name = d->permutation[i];
        if (d->due_pos[name] >= 0 && d->count >= d->due_pos[name]) return name;
    }
    return -1;
}

// Generates document `index` of the training (val = 0) or validation part (val = 1). The document depends on
// (seed, val, index) and the other settings only, not on other documents.
static void make_document(Document *d, const RecallConfig *c, int val, int64_t index) {
    Rng r;
    rng_seed(&r, (uint64_t)c->seed, 2 * (uint64_t)index + (uint64_t)val);
    d->count = d->answer_count = 0;
    for (int64_t i = 0; i < c->names; i++) {
        d->thing_pos[i] = d->due_pos[i] = -1;
        d->period[i] = 0;
        d->permutation[i] = i;
    }

    // Delayed names: their statements fill at most half of a quarter of the document. Due positions leave
    // space for one statement per name and `slack` tokens before the quarter's end. So all statements fit,
    // even if several names are due at once while other sentences are in progress.
    int64_t quarter = d->length / 4, slack = 2 * SENTENCE_TOKENS;
    int64_t delayed = min_of(c->names / 4, quarter / (2 * SENTENCE_TOKENS));
    if (quarter <= delayed * SENTENCE_TOKENS + slack) delayed = 0;
    int64_t due_range = quarter - delayed * SENTENCE_TOKENS - slack;
    rng_shuffle(d->permutation, c->names, rng_u64(&r), 0);
    for (int64_t i = 0; i < delayed; i++) d->due_pos[d->permutation[i]] = 1 + rng_below(&r, due_range);

    double sentences = (double)d->length / SENTENCE_TOKENS, statements = (1 - FILLER_FRACTION) * sentences;

    // Periodic names take the periods seq_len/2, seq_len/4, ..., MIN_PERIOD round-robin. There is one for
    // each period, or a quarter of the names if that is more. They are at most half of the names, and
    // RECALL_FRACTION limits how many of them get a Remember.
    int64_t periods = 0, periodic = 0;
    while (c->seq_len >> (periods + 1) >= MIN_PERIOD) periods++;
    if (periods > 0) periodic = periods < c->names / 4 ? c->names / 4 : min_of(periods, c->names / 2);
    periodic = min_of(periodic, (int64_t)((1 - RECALL_FRACTION) * statements) - delayed - 1);
    if (periodic < 0) periodic = 0;
    double scheduled_recalls = (double)delayed;
    for (int64_t i = 0; i < periodic; i++) {
        int64_t name = d->permutation[delayed + i], period = c->seq_len >> (i % periods + 1);
        d->period[name] = period;
        d->due_pos[name] = 1 + rng_below(&r, period / 2);
        scheduled_recalls += (double)d->length / (0.72 * (double)period); // 0.72 * period: the mean distance
    }

    // Every delayed or periodic name has one Remember. The probability of a Remember in the statements about
    // other names makes RECALL_FRACTION of all statements Recalls.
    double scheduled_remembers = (double)(delayed + periodic);
    double other_statements = statements - scheduled_remembers - scheduled_recalls;
    double remember_prob = ((1 - RECALL_FRACTION) * statements - scheduled_remembers) /
                           (other_statements > 1 ? other_statements : 1);
    if (remember_prob < MIN_REMEMBER_FRACTION) remember_prob = MIN_REMEMBER_FRACTION;

    // Delayed names come before fillers, so a filler is more likely in the other sentences.
    double filler_prob = FILLER_FRACTION * sentences / (sentences - 2.0 * (double)delayed);

    append_token(d, EOT);
    while (d->count < d->length) {
        int64_t due_name = find_due_name(d, 0, delayed);
        if (due_name >= 0) {
            int first = d->thing_pos[due_name] < 0;
            if (first) append_remember(d, c, &r, due_name);
            if (!first) append_statement(d, RECALL, due_name);
            d->due_pos[due_name] = first ? d->length - quarter + rng_below(&r, due_range) : -1;
            continue;
        }
        if (rng_uniform(&r) < filler_prob) {
            for (int i = 0; i < FILLER_WORDS; i++) {
                append_token(d, (int32_t)(FIRST_NAME + c->names + c->things + rng_below(&r, c->fillers)));
            }
            append_token(d, PERIOD);
            continue;
        }
        due_name = find_due_name(d, delayed, delayed + periodic);
        if (due_name >= 0) {
            if (d->thing_pos[due_name] < 0)
                append_remember(d, c, &r, due_name);
            else
                append_statement(d, RECALL, due_name);
            double distance = (double)d->period[due_name] * pow(2.0, rng_uniform(&r) - 1);
            d->due_pos[due_name] = d->thing_pos[due_name] - THING_OFFSET + (int64_t)distance;
            continue;
        }
        int64_t recalled = -1, pos = d->count + THING_OFFSET;
        double target = SENTENCE_TOKENS * pow((double)pos / SENTENCE_TOKENS, rng_uniform(&r)),
               min_error = INFINITY;
        for (int64_t i = 0; i < c->names; i++) {
            if (d->thing_pos[i] < 0 || d->due_pos[i] >= 0) continue;
            double error = fabs((double)(pos - d->thing_pos[i]) - target);
            if (error < min_error) {
                min_error = error;
                recalled = i;
            }
        }
        if (recalled >= 0 && rng_uniform(&r) >= remember_prob) {
            append_statement(d, RECALL, recalled);
            continue;
        }
        int64_t name;
        do name = rng_below(&r, c->names);
        while (d->due_pos[name] >= 0);
        append_remember(d, c, &r, name);
    }
}

// Returns the bucket of a distance. The last bucket also counts all greater distances.
static int bucket_of(int64_t distance) {
    int k = 0;
    while (distance >> (k + 1) > 0 && k < BUCKETS - 1) k++;
    return k;
}

// Returns whether every bucket from FIRST_FILLED_BUCKET on that lies within the context has
// MIN_BUCKET_ANSWERS.
static int buckets_filled(const int64_t *counts, int64_t seq_len) {
    for (int k = FIRST_FILLED_BUCKET; k < BUCKETS && (int64_t)2 << k <= seq_len; k++) {
        if (counts[k] < MIN_BUCKET_ANSWERS) return 0;
    }
    return 1;
}

// Writes the path of a shard to out [PATH_BYTES].
static void part_path(char *out, const char *folder, int val, int64_t shard) {
    int n =
        snprintf(out, PATH_BYTES, "%s/recall_%s_%06lld.bin", folder, val ? "val" : "train", (long long)shard);
    if (n >= PATH_BYTES)
        die("-o: folder name of %zu characters is too long; use a shorter one", strlen(folder));
}

// Appends a finished file's name and size to the manifest (recall.txt).
static void manifest_add(AtomicFile *manifest, const char *path) {
    char line[PATH_BYTES + 64];
    struct stat st;
    if (stat(path, &st) != 0) die("cannot read %s: %s", path, strerror(errno));
    int n = snprintf(line, sizeof(line), "file %s %lld\n", file_name(path), (long long)st.st_size);
    atomic_write(manifest, line, (size_t)n);
}

// Writes all shards and answers files of the training (val = 0) or validation part (val = 1), adds them to
// the manifest, and adds the answers by bucket to counts [BUCKETS]. Returns the number of documents.
static int64_t make_part(const RecallConfig *c, const char *folder, int val, int64_t vocab_size,
                         int64_t *counts, AtomicFile *manifest) {
    char path[PATH_BYTES], answers_file[PATH_BYTES];
    Document d;
    int64_t docs_per_shard = MAX_SHARD_TOKENS / (c->seq_len + 1), capacity = 0, made = 0, shard = 0;
    d.length = c->seq_len + 1;
    d.tokens = (int32_t *)xmalloc((size_t)d.length * sizeof(int32_t));
    d.answers = (Answer *)xmalloc((size_t)(d.length / SENTENCE_TOKENS + 1) * sizeof(Answer));
    d.thing_token = (int32_t *)xmalloc((size_t)c->names * sizeof(int32_t));
    d.thing_pos = (int64_t *)xmalloc((size_t)c->names * sizeof(int64_t));
    d.due_pos = (int64_t *)xmalloc((size_t)c->names * sizeof(int64_t));
    d.period = (int64_t *)xmalloc((size_t)c->names * sizeof(int64_t));
    d.permutation = (int64_t *)xmalloc((size_t)c->names * sizeof(int64_t));
    int64_t docs = val ? c->val_docs : c->train_docs;
    for (int done = 0; !done; shard++) {
        ShardWriter w;
        Answers a;
        memset(&a, 0, sizeof(a));
        a.seq_len = c->seq_len;
        part_path(path, folder, val, shard);
        shard_writer_open(&w, path, vocab_size);
        for (int64_t i = 0; i < docs_per_shard && !done; i++) {
            make_document(&d, c, val, made++);
            shard_writer_add(&w, d.tokens, d.length);
            if (a.count + d.answer_count > capacity || a.answers == NULL) {
                capacity = 2 * (a.count + d.answer_count) + 1024;
                a.answers = (Answer *)realloc(a.answers, (size_t)capacity * sizeof(Answer));
                if (a.answers == NULL) die("out of memory for %lld answers", (long long)capacity);
            }
            for (int64_t k = 0; k < d.answer_count; k++) {
                a.answers[a.count] = d.answers[k];
                a.answers[a.count++].index += i * d.length;
                counts[bucket_of(d.answers[k].distance)]++;
            }
            if (docs > 0)
                done = made == docs;
            else
                done = made >= MIN_VAL_DOCS && (buckets_filled(counts, c->seq_len) || made == MAX_VAL_DOCS);
        }
        shard_writer_commit(&w);
        answers_save(&a, path);
        answers_free(&a);
        answers_path(answers_file, path);
        manifest_add(manifest, path);
        manifest_add(manifest, answers_file);
    }
    free(d.tokens);
    free(d.answers);
    free(d.thing_token);
    free(d.thing_pos);
    free(d.due_pos);
    free(d.period);
    free(d.permutation);
    return made;
}

// Removes the shards and answers files that an earlier run left in the folder, complete or not.
static void remove_old_files(const char *folder) {
    static const char *const suffixes[] = {".bin", ".answers", ".bin.tmp", ".answers.tmp"};
    char path[PATH_BYTES];
    DIR *entries = opendir(folder);
    if (entries == NULL) die("cannot read folder %s: %s", folder, strerror(errno));
    for (struct dirent *entry; (entry = readdir(entries)) != NULL;) {
        const char *name = entry->d_name;
        size_t prefix = strncmp(name, "recall_train_", 13) == 0 ? 13
                        : strncmp(name, "recall_val_", 11) == 0 ? 11
                                                                : 0;
        size_t digits = prefix > 0 ? strspn(name + prefix, "0123456789") : 0;
        for (int i = 0; i < 4 && digits >= 6; i++) {
            if (strcmp(name + prefix + digits, suffixes[i]) != 0) continue;
            if (snprintf(path, sizeof(path), "%s/%s", folder, name) >= PATH_BYTES || unlink(path) != 0)
                die("cannot remove the old file %s/%s: %s; remove it yourself", folder, name,
                    strerror(errno));
        }
    }
    closedir(entries);
}

// Appends n words to pieces and lengths: those of list [size], then numbered ones (key2, ..., key3, ...),
// each followed by `suffix`. The caller frees the pieces.
static void add_words(const char **pieces, int *lengths, int64_t *count, const char *const *list,
                      int64_t size, int64_t n, const char *suffix) {
    for (int64_t i = 0; i < n; i++) {
        char *word = (char *)xmalloc(32);
        char number[24] = "";
        if (i >= size) snprintf(number, sizeof(number), "%lld", (long long)(i / size + 1));
        pieces[*count] = word;
        lengths[(*count)++] = snprintf(word, 32, "%s%s%s", list[i % size], number, suffix);
    }
}

// Writes the tokenizer file. Returns the vocabulary size.
static int64_t make_tokenizer(const RecallConfig *c, const char *path) {
    static const char *const marks[FIRST_NAME] = {"<|endoftext|>", "Remember", "Recall", "."};
    int64_t vocab_size = FIRST_NAME + c->names + c->things + c->fillers, count = 0;
    const char **pieces = (const char **)xmalloc((size_t)vocab_size * sizeof(char *));
    int *lengths = (int *)xmalloc((size_t)vocab_size * sizeof(int));
    add_words(pieces, lengths, &count, marks, FIRST_NAME, FIRST_NAME, "");
    add_words(pieces, lengths, &count, NAMES, 16, c->names, " :");
    add_words(pieces, lengths, &count, THINGS, 16, c->things, "");
    add_words(pieces, lengths, &count, FILLERS, 32, c->fillers, "");
    tokenizer_write(path, TOKENIZER_WORDS, (int)vocab_size, EOT, pieces, lengths, NULL);
    for (int64_t i = 0; i < vocab_size; i++) free((void *)pieces[i]);
    free(pieces);
    free(lengths);
    return vocab_size;
}

// Returns whether the manifest is that of a finished run with these parameters and all of its files exist
// with the recorded sizes.
static int is_complete(const char *folder, const char *manifest_path, const char *parameters) {
    char line[PATH_BYTES], name[PATH_BYTES], path[2 * PATH_BYTES];
    size_t n = strlen(parameters), files = 0;
    struct stat st;
    FILE *f = input_fopen("", manifest_path, &st);
    if (f == NULL) return 0;
    int same = fread(line, 1, n, f) == n && memcmp(line, parameters, n) == 0;
    while (same && fgets(line, sizeof(line), f) != NULL) {
        long long size;
        if (sscanf(line, "file %4000s %lld", name, &size) != 2) continue;
        snprintf(path, sizeof(path), "%s/%s", folder, name);
        same = stat(path, &st) == 0 && st.st_size == size;
        files++;
    }
    fclose(f);
    return same && files > 0;
}

// Prints the number of answers in each bucket that has any: counts[0] of training, counts[1] of validation.
static void print_table(const int64_t counts[2][BUCKETS], int64_t seq_len) {
    printf("answers by distance in tokens\n%15s %10s %10s\n", "distance", "train", "val");
    for (int k = 0; k < BUCKETS; k++) {
        if (counts[0][k] + counts[1][k] == 0) continue;
        char range[48];
        long long low = 1ll << k, high = (2ll << k) - 1;
        snprintf(range, sizeof(range), "%lld-%lld", low, high < seq_len ? high : (long long)seq_len);
        printf("%15s %10lld %10lld\n", range, (long long)counts[0][k], (long long)counts[1][k]);
    }
}

static const char USAGE[] =
    "recall -o DIR: writes shards, answers and the tokenizer of the recall task to DIR\n"
    "  -t N         context length, 32 to 65536; a document has N + 1 tokens (256)\n"
    "  -n N         number of training documents (6000, or fewer: at most 2^24 tokens)\n"
    "  -m N         number of validation documents (128 to 4096, until each bucket from distance 32 up has\n"
    "               400 answers)\n"
    "  -seed N      random seed (1)\n"
    "  -names N     number of names (16)\n"
    "  -things N    number of things; a guess is right with probability 1/N (16)\n"
    "  -fillers N   number of filler words (32)\n";

int main(int argc, char **argv) {
    RecallConfig c = {256, 0, 0, 1, 16, 16, 32};
    const char *folder = NULL;
    open_standard_files();
    signal(SIGPIPE, SIG_IGN); // a write to a closed pipe is an error, which finish_stdout reports
    for (int i = 1; i < argc; i += 2) {
        const char *flag = argv[i], *value = i + 1 < argc ? argv[i + 1] : NULL;
        if (strcmp(flag, "-h") == 0 || strcmp(flag, "-help") == 0 || strcmp(flag, "--help") == 0) {
            fputs(USAGE, stdout);
            finish_stdout();
            return 0;
        } else if (strcmp(flag, "-o") == 0 && value != NULL)
            folder = value;
        else if (strcmp(flag, "-t") == 0)
            c.seq_len = parse_int(flag, value, 32, 65536);
        else if (strcmp(flag, "-n") == 0)
            c.train_docs = parse_int(flag, value, 1, 1 << 30);
        else if (strcmp(flag, "-m") == 0)
            c.val_docs = parse_int(flag, value, 1, 1 << 30);
        else if (strcmp(flag, "-seed") == 0)
            c.seed = parse_int(flag, value, 0, INT64_MAX);
        else if (strcmp(flag, "-names") == 0)
            c.names = parse_int(flag, value, 1, 16384);
        else if (strcmp(flag, "-things") == 0)
            c.things = parse_int(flag, value, 2, 16384);
        else if (strcmp(flag, "-fillers") == 0)
            c.fillers = parse_int(flag, value, 1, 16384);
        else
            die("unknown flag '%s', or its value is missing; recall -h lists the flags", flag);
    }
    if (folder == NULL) die("-o DIR is missing; name the folder for the shards, for example -o data/recall");
    if (c.train_docs == 0) {
        c.train_docs = (1 << 24) / (c.seq_len + 1);
        if (c.train_docs > 6000) c.train_docs = 6000;
    }

    char parameters[512], manifest_path[PATH_BYTES], path[PATH_BYTES], val_docs[32] = "automatic";
    if (c.val_docs > 0) snprintf(val_docs, sizeof(val_docs), "%lld", (long long)c.val_docs);
    if (strlen(folder) > PATH_BYTES - 64) {
        die("-o: folder name of %zu characters; at most %d", strlen(folder), PATH_BYTES - 64);
    }
    snprintf(manifest_path, sizeof(manifest_path), "%s/recall.txt", folder);
    snprintf(parameters, sizeof(parameters),
             "recall 2\nseq_len %lld\ntrain_docs %lld\nval_docs %s\nseed %lld\nnames %lld\nthings %lld\n"
             "fillers %lld\n",
             (long long)c.seq_len, (long long)c.train_docs, val_docs, (long long)c.seed, (long long)c.names,
             (long long)c.things, (long long)c.fillers);
    if (is_complete(folder, manifest_path, parameters)) {
        printf("%s already has this data: nothing to do (remove %s to generate it again)\n", folder,
               manifest_path);
        finish_stdout();
        return 0;
    }

    // The old manifest is removed first, then the old shards, and the new manifest appears last. A folder
    // without one is unfinished, and holds no mix of old and new shards.
    AtomicFile manifest;
    Tokenizer old;
    int64_t counts[2][BUCKETS];
    memset(counts, 0, sizeof(counts));
    make_dirs(folder);
    folder_lock("-o", folder);
    snprintf(path, sizeof(path), "%s/tokenizer.bin", folder);
    if (tokenizer_load(&old, path) == 0 && old.kind != TOKENIZER_WORDS) {
        die("%s belongs to other data (vocabulary of %d tokens); choose another folder with -o", path,
            old.vocab_size);
    }
    tokenizer_free(&old);
    atomic_open(&manifest, manifest_path);
    atomic_write(&manifest, parameters, strlen(parameters));
    if (unlink(manifest_path) != 0 && errno != ENOENT)
        die("cannot replace %s: %s", manifest_path, strerror(errno));
    remove_old_files(folder);
    int64_t vocab_size = make_tokenizer(&c, path);
    manifest_add(&manifest, path);
    int64_t train_docs = make_part(&c, folder, 0, vocab_size, counts[0], &manifest);
    int64_t val_made = make_part(&c, folder, 1, vocab_size, counts[1], &manifest);
    atomic_commit(&manifest);
    printf("%s: %lld training and %lld validation documents of %lld tokens, vocabulary %lld\n", folder,
           (long long)train_docs, (long long)val_made, (long long)(c.seq_len + 1), (long long)vocab_size);
    print_table((const int64_t(*)[BUCKETS])counts, c.seq_len);
    finish_stdout();
    return 0;
}
