// recall.c: makes the default task, recall of things told long ago, as shards of word tokens.
//
//   Remember Mara : lamp .        tells a thing; telling again replaces it
//   Recall Mara : lamp .          the thing is to be predicted from the newest statement about Mara
//   soon far below .              filler
//
// Each of these turns has four tokens, a name and its colon being one.
// A document is seq_len + 1 tokens, the first of them end-of-text, the last statement cut where it ends.
// For a recall a distance is drawn log-uniformly, and the name whose newest statement is nearest to that
// distance is asked. Few names asked often can't be asked after long, so in each document a quarter of the
// names, its held ones, are told in its first quarter and not mentioned again until they are asked in its
// last; and some more, its paced ones, are asked only every w/2 to w tokens, w a power of two of their own.
// The rules in full, and the files: data/README.md.
#include "../llmc/shard.h"
#include "../llmc/rand.h"
#include "../llmc/tokenizer.h"

enum { EOT, REMEMBER, RECALL, PERIOD, FIRST_NAME };
enum { STATEMENT = 4, THING_AT = 2 };  // tokens of a statement; where in it the thing stands
enum { FILLER_WORDS = STATEMENT - 1 }; // of a filler sentence, which so is as long as a statement
#define FILLER_SHARE 0.1               // of all turns
#define RECALL_SHARE 0.8               // of all statements
#define REMEMBER_LEAST 0.1             // of the statements about names neither held nor paced
enum { PACE_LEAST = 64 };              // the smallest w
#define SHARD_TOKENS 100000000         // at most, in one shard
#define BUCKETS 18                     // bucket k counts distances from 2^k up to 2^(k+1) - 1
#define BUCKET_ANSWERS 400             // that the validation documents give each bucket from 32 up
#define BUCKET_FIRST 5
#define VAL_DOCS_MIN 128
#define VAL_DOCS_MAX 4096

static const char *const NAMES[16] = {"Mara",  "Tomas", "Ines",  "Pavel", "Ruth",  "Omar",  "Lena", "Hugo",
                                      "Nadia", "Felix", "Clara", "Ivan",  "Greta", "Simon", "Yara", "Bruno"};
static const char *const THINGS[16] = {"lamp", "key",  "drum", "coat",  "bell",  "rope",  "book",  "cup",
                                       "ring", "boot", "map",  "flute", "clock", "sword", "shell", "basket"};
static const char *const FILLERS[32] = {
    "then",  "soon",  "far",   "below", "rain", "came",   "over", "hills", "some",  "birds", "sang",
    "and",   "wind",  "moved", "trees", "slow", "clouds", "went", "by",    "night", "fell",  "on",
    "quiet", "roads", "while", "snow",  "lay",  "deep",   "near", "old",   "stone", "walls"};

typedef struct {
    int64_t seq_len, train_docs, val_docs, seed, names, things, fillers; // val_docs 0: as many as needed
} Recall;

// A document being written, and what its generator knows.
typedef struct {
    int32_t *tokens; // [seq_len + 1]
    int64_t length, count;
    Answer *answers; // of this document, indices within it; at most one in STATEMENT tokens
    int64_t answer_count;
    int32_t *thing; // [names] newest thing told, as a token
    int64_t *place; // [names] where it was last mentioned, -1: not yet
    int64_t *until; // [names] where a held or paced name is told or asked next, -1: at any time
    int64_t *pace;  // [names] w of a paced name, else 0
    int64_t *order; // [names] a permutation: the held names come first, then the paced ones
} Document;

static void put(Document *d, int32_t token) {
    if (d->count < d->length) d->tokens[d->count++] = token;
}

static void statement(Document *d, int verb, int64_t name) {
    int64_t place = d->count + THING_AT;
    if (verb == RECALL && place < d->length) {
        d->answers[d->answer_count].index = place;
        d->answers[d->answer_count++].distance = place - d->place[name];
    }
    put(d, verb);
    put(d, (int32_t)(FIRST_NAME + name));
    put(d, d->thing[name]);
    put(d, PERIOD);
    d->place[name] = place;
}

static void tell(Document *d, const Recall *p, Rng *r, int64_t name) {
    d->thing[name] = (int32_t)(FIRST_NAME + p->names + rng_below(r, p->things));
    statement(d, REMEMBER, name);
}

static int64_t min_of(int64_t a, int64_t b) {
    return a < b ? a : b;
}

// Of the names at [from, to) of the order, one whose time has come; -1: none.
static int64_t next_due(const Document *d, int64_t from, int64_t to) {
    for (int64_t i = from; i < to; i++) {
        int64_t name = d->order[i];
        if (d->until[name] >= 0 && d->count >= d->until[name]) return name;
    }
    return -1;
}

// Writes document `index` of the training or validation part; each depends on (seed, part, index) alone.
static void make_document(Document *d, const Recall *p, int val, int64_t index) {
    Rng r;
    rng_seed(&r, (uint64_t)p->seed, 2 * (uint64_t)index + (uint64_t)val);
    d->count = d->answer_count = 0;
    for (int64_t i = 0; i < p->names; i++) {
        d->place[i] = d->until[i] = -1;
        d->pace[i] = 0;
        d->order[i] = i;
    }

    // Held names: no more than half of a quarter has room for, so that all are told and asked in time
    // even when several fall due together, after a statement and a filler sentence under way.
    int64_t quarter = d->length / 4, late = 2 * STATEMENT;
    int64_t held = min_of(p->names / 4, quarter / (2 * STATEMENT));
    if (quarter <= held * STATEMENT + late) held = 0;
    int64_t spread = quarter - held * STATEMENT - late;
    rng_shuffle(d->order, p->names, rng_u64(&r), 0);
    for (int64_t i = 0; i < held; i++) d->until[d->order[i]] = 1 + rng_below(&r, spread);

    double turns = (double)d->length / STATEMENT, statements = (1 - FILLER_SHARE) * turns;

    // Paced names: one for each w from seq_len / 2 down to PACE_LEAST, a second round up to a quarter of the
    // names; at most half of them, and no more than RECALL_SHARE lets be told.
    int64_t paces = 0, paced = 0;
    while (p->seq_len >> (paces + 1) >= PACE_LEAST) paces++;
    if (paces > 0) paced = paces < p->names / 4 ? p->names / 4 : min_of(paces, p->names / 2);
    paced = min_of(paced, (int64_t)((1 - RECALL_SHARE) * statements) - held - 1);
    if (paced < 0) paced = 0;
    double asked_by_plan = (double)held;
    for (int64_t i = 0; i < paced; i++) {
        int64_t name = d->order[held + i], w = p->seq_len >> (i % paces + 1);
        d->pace[name] = w;
        d->until[name] = 1 + rng_below(&r, w / 2);
        asked_by_plan += (double)d->length / (0.72 * (double)w); // the mean of a distance
    }

    // All those are told once; the other names are told as often as RECALL_SHARE leaves.
    double told_by_plan = (double)(held + paced);
    double others = statements - told_by_plan - asked_by_plan;
    double remember = ((1 - RECALL_SHARE) * statements - told_by_plan) / (others > 1 ? others : 1);
    if (remember < REMEMBER_LEAST) remember = REMEMBER_LEAST;

    // Held names leave no choice, so fillers are likelier at the other turns.
    double filler = FILLER_SHARE * turns / (turns - 2.0 * (double)held);

    put(d, EOT);
    while (d->count < d->length) {
        int64_t due = next_due(d, 0, held);
        if (due >= 0) {
            int first = d->place[due] < 0;
            if (first) tell(d, p, &r, due);
            if (!first) statement(d, RECALL, due);
            d->until[due] = first ? d->length - quarter + rng_below(&r, spread) : -1;
            continue;
        }
        if (rng_uniform(&r) < filler) {
            for (int i = 0; i < FILLER_WORDS; i++) {
                put(d, (int32_t)(FIRST_NAME + p->names + p->things + rng_below(&r, p->fillers)));
            }
            put(d, PERIOD);
            continue;
        }
        due = next_due(d, held, held + paced);
        if (due >= 0) {
            if (d->place[due] < 0)
                tell(d, p, &r, due);
            else
                statement(d, RECALL, due);
            double distance = (double)d->pace[due] * pow(2.0, rng_uniform(&r) - 1);
            d->until[due] = d->place[due] - THING_AT + (int64_t)distance;
            continue;
        }
        int64_t asked = -1, place = d->count + THING_AT;
        double target = STATEMENT * pow((double)place / STATEMENT, rng_uniform(&r)), nearest = INFINITY;
        for (int64_t i = 0; i < p->names; i++) {
            if (d->place[i] < 0 || d->until[i] >= 0) continue;
            double miss = fabs((double)(place - d->place[i]) - target);
            if (miss < nearest) {
                nearest = miss;
                asked = i;
            }
        }
        if (asked >= 0 && rng_uniform(&r) >= remember) {
            statement(d, RECALL, asked);
            continue;
        }
        int64_t name;
        do name = rng_below(&r, p->names);
        while (d->until[name] >= 0);
        tell(d, p, &r, name);
    }
}

static int bucket_of(int64_t distance) {
    int k = 0;
    while (distance >> (k + 1) > 0 && k < BUCKETS - 1) k++;
    return k;
}

// Whether each bucket from 32 up that lies wholly within the context has its answers.
static int enough(const int64_t *counts, int64_t seq_len) {
    for (int k = BUCKET_FIRST; k < BUCKETS && (int64_t)2 << k <= seq_len; k++) {
        if (counts[k] < BUCKET_ANSWERS) return 0;
    }
    return 1;
}

static void part_path(char *out, const char *folder, int val, int64_t shard) {
    int n =
        snprintf(out, PATH_BYTES, "%s/recall_%s_%06lld.bin", folder, val ? "val" : "train", (long long)shard);
    if (n >= PATH_BYTES) die("folder name of %zu characters is too long", strlen(folder));
}

// The lines that recall.txt keeps of a finished file.
static void list_file(AtomicFile *list, const char *path) {
    char line[PATH_BYTES + 64];
    struct stat st;
    if (stat(path, &st) != 0) die("cannot read %s: %s", path, strerror(errno));
    int n = snprintf(line, sizeof(line), "file %s %lld\n", strrchr(path, '/') + 1, (long long)st.st_size);
    atomic_write(list, line, (size_t)n);
}

// Writes all shards of a part and their answers, and counts these by bucket; returns the documents made.
static int64_t make_part(const Recall *p, const char *folder, int val, int64_t vocab_size, int64_t *counts,
                         AtomicFile *list) {
    char path[PATH_BYTES], answers_file[PATH_BYTES];
    Document d;
    int64_t per_shard = SHARD_TOKENS / (p->seq_len + 1), capacity = 0, made = 0, shard = 0;
    d.length = p->seq_len + 1;
    d.tokens = (int32_t *)xmalloc((size_t)d.length * sizeof(int32_t));
    d.answers = (Answer *)xmalloc((size_t)(d.length / STATEMENT + 1) * sizeof(Answer));
    d.thing = (int32_t *)xmalloc((size_t)p->names * sizeof(int32_t));
    d.place = (int64_t *)xmalloc((size_t)p->names * sizeof(int64_t));
    d.until = (int64_t *)xmalloc((size_t)p->names * sizeof(int64_t));
    d.pace = (int64_t *)xmalloc((size_t)p->names * sizeof(int64_t));
    d.order = (int64_t *)xmalloc((size_t)p->names * sizeof(int64_t));
    int64_t docs = val ? p->val_docs : p->train_docs;
    for (int done = 0; !done; shard++) {
        ShardWriter w;
        Answers a;
        memset(&a, 0, sizeof(a));
        a.seq_len = p->seq_len;
        part_path(path, folder, val, shard);
        shard_writer_open(&w, path, vocab_size);
        for (int64_t i = 0; i < per_shard && !done; i++) {
            make_document(&d, p, val, made++);
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
                done = made >= VAL_DOCS_MIN && (enough(counts, p->seq_len) || made == VAL_DOCS_MAX);
        }
        shard_writer_commit(&w);
        answers_save(&a, path);
        answers_free(&a);
        answers_path(answers_file, path);
        list_file(list, path);
        list_file(list, answers_file);
    }
    for (;; shard++) { // what is left of an earlier run that made more
        part_path(path, folder, val, shard);
        answers_path(answers_file, path);
        if (unlink(answers_file) + unlink(path) == -2) break;
    }
    free(d.tokens);
    free(d.answers);
    free(d.thing);
    free(d.place);
    free(d.until);
    free(d.pace);
    free(d.order);
    return made;
}

// The words of a list, then the same with a number: key, ..., key2, ...; each followed by `ending`.
static void add_words(const char **pieces, int *lengths, int64_t *count, const char *const *list,
                      int64_t size, int64_t wanted, const char *ending) {
    for (int64_t i = 0; i < wanted; i++) {
        char *word = (char *)xmalloc(32);
        char number[24] = "";
        if (i >= size) snprintf(number, sizeof(number), "%lld", (long long)(i / size + 1));
        pieces[*count] = word;
        lengths[(*count)++] = snprintf(word, 32, "%s%s%s", list[i % size], number, ending);
    }
}

// Writes the tokenizer; returns the size of the vocabulary.
static int64_t make_tokenizer(const Recall *p, const char *path) {
    static const char *const marks[FIRST_NAME] = {"<|endoftext|>", "Remember", "Recall", "."};
    int64_t vocab_size = FIRST_NAME + p->names + p->things + p->fillers, count = 0;
    const char **pieces = (const char **)xmalloc((size_t)vocab_size * sizeof(char *));
    int *lengths = (int *)xmalloc((size_t)vocab_size * sizeof(int));
    add_words(pieces, lengths, &count, marks, FIRST_NAME, FIRST_NAME, "");
    add_words(pieces, lengths, &count, NAMES, 16, p->names, " :");
    add_words(pieces, lengths, &count, THINGS, 16, p->things, "");
    add_words(pieces, lengths, &count, FILLERS, 32, p->fillers, "");
    tokenizer_write(path, TOKENIZER_WORDS, (int)vocab_size, EOT, pieces, lengths, NULL);
    for (int64_t i = 0; i < vocab_size; i++) free((void *)pieces[i]);
    free(pieces);
    free(lengths);
    return vocab_size;
}

// Whether `file` is the list of a finished run with these parameters, all of whose files are there.
static int already_made(const char *folder, const char *file, const char *parameters) {
    char line[PATH_BYTES], name[PATH_BYTES], path[2 * PATH_BYTES];
    size_t n = strlen(parameters), files = 0;
    struct stat st;
    FILE *f = fopen(file, "rb");
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

// One line a bucket, to stdout; the training answers are those of all documents.
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
    "recall -o DIR: makes the recall task's shards, answers and tokenizer in DIR\n"
    "  -t N         context: documents have N + 1 tokens, 32 to 65536 (256)\n"
    "  -n N         training documents (6000, fewer where that would pass 2^24 tokens)\n"
    "  -m N         validation documents (128 or more, until each distance bucket from 32 up has 400 "
    "answers)\n"
    "  -seed N      seed (1)\n"
    "  -names N     names (16)\n"
    "  -things N    things (16): chance is 1 in N\n"
    "  -fillers N   filler words (32)\n";

int main(int argc, char **argv) {
    Recall p = {256, 0, 0, 1, 16, 16, 32};
    const char *folder = NULL;
    for (int i = 1; i < argc; i += 2) {
        const char *flag = argv[i], *value = i + 1 < argc ? argv[i + 1] : NULL;
        if (strcmp(flag, "-h") == 0 || strcmp(flag, "-help") == 0 || strcmp(flag, "--help") == 0) {
            fputs(USAGE, stdout);
            return 0;
        } else if (strcmp(flag, "-o") == 0 && value != NULL)
            folder = value;
        else if (strcmp(flag, "-t") == 0)
            p.seq_len = parse_int(flag, value, 32, 65536);
        else if (strcmp(flag, "-n") == 0)
            p.train_docs = parse_int(flag, value, 1, 1 << 30);
        else if (strcmp(flag, "-m") == 0)
            p.val_docs = parse_int(flag, value, 1, 1 << 30);
        else if (strcmp(flag, "-seed") == 0)
            p.seed = parse_int(flag, value, 0, INT64_MAX);
        else if (strcmp(flag, "-names") == 0)
            p.names = parse_int(flag, value, 1, 16384);
        else if (strcmp(flag, "-things") == 0)
            p.things = parse_int(flag, value, 2, 16384);
        else if (strcmp(flag, "-fillers") == 0)
            p.fillers = parse_int(flag, value, 1, 16384);
        else
            die("unknown flag or missing value: '%s'; recall -h lists the flags", flag);
    }
    if (folder == NULL) die("-o DIR is missing: the folder for the shards, for example -o data/recall");
    if (p.train_docs == 0) {
        p.train_docs = (1 << 24) / (p.seq_len + 1);
        if (p.train_docs > 6000) p.train_docs = 6000;
    }

    char parameters[512], list_path[PATH_BYTES], path[PATH_BYTES], val_docs[32] = "automatic";
    if (p.val_docs > 0) snprintf(val_docs, sizeof(val_docs), "%lld", (long long)p.val_docs);
    if (strlen(folder) > PATH_BYTES - 64) die("folder name of %zu characters is too long", strlen(folder));
    snprintf(list_path, sizeof(list_path), "%s/recall.txt", folder);
    snprintf(parameters, sizeof(parameters),
             "recall 2\nseq_len %lld\ntrain_docs %lld\nval_docs %s\nseed %lld\nnames %lld\nthings %lld\n"
             "fillers %lld\n",
             (long long)p.seq_len, (long long)p.train_docs, val_docs, (long long)p.seed, (long long)p.names,
             (long long)p.things, (long long)p.fillers);
    if (already_made(folder, list_path, parameters)) {
        printf("%s is there with these parameters: nothing to do (remove %s to make it anew)\n", folder,
               list_path);
        return 0;
    }

    // recall.txt goes first and comes last: without it the folder counts as unfinished
    AtomicFile list;
    Tokenizer old;
    int64_t counts[2][BUCKETS];
    memset(counts, 0, sizeof(counts));
    make_dirs(folder);
    snprintf(path, sizeof(path), "%s/tokenizer.bin", folder);
    if (tokenizer_load(&old, path) == 0 && old.kind != TOKENIZER_WORDS) {
        die("%s belongs to other data, of %d tokens: choose another folder with -o", path, old.vocab_size);
    }
    tokenizer_free(&old);
    atomic_open(&list, list_path);
    atomic_write(&list, parameters, strlen(parameters));
    if (unlink(list_path) != 0 && errno != ENOENT) die("cannot replace %s: %s", list_path, strerror(errno));
    int64_t vocab_size = make_tokenizer(&p, path);
    list_file(&list, path);
    int64_t train_docs = make_part(&p, folder, 0, vocab_size, counts[0], &list);
    int64_t val_made = make_part(&p, folder, 1, vocab_size, counts[1], &list);
    atomic_commit(&list);
    printf("%s: %lld training and %lld validation documents of %lld tokens, vocabulary %lld\n", folder,
           (long long)train_docs, (long long)val_made, (long long)(p.seq_len + 1), (long long)vocab_size);
    print_table((const int64_t(*)[BUCKETS])counts, p.seq_len);
    return 0;
}
