// text.c: makes byte shards of text files. A file is a document: an end-of-text token, then its bytes. The
// last part of each file is held out for validation. The files: data/README.md.
#include "../llmc/shard.h"
#include "../llmc/tokenizer.h"
#include <dirent.h>

enum { EOT = 256, VOCAB_SIZE = 257 };

typedef struct {
    char **paths;
    int64_t count, capacity;
} FileList;

static void list_add(FileList *list, const char *path) {
    if (list->count == list->capacity) {
        list->capacity = 2 * list->capacity + 64;
        list->paths = (char **)realloc(list->paths, (size_t)list->capacity * sizeof(char *));
        if (list->paths == NULL) die("out of memory for %lld file names", (long long)list->capacity);
    }
    char *copy = (char *)xmalloc(strlen(path) + 1);
    list->paths[list->count++] = strcpy(copy, path);
}

static int by_name(const struct dirent **a, const struct dirent **b) {
    return strcmp((*a)->d_name, (*b)->d_name);
}

// Adds a file, or the files of a folder and its subfolders in the order of their names. In folders, hidden
// entries and empty files are passed over; named by the user, an empty file is an error.
static void find_files(FileList *list, const char *path, int inside) {
    struct stat st;
    struct dirent **entries;
    if (stat(path, &st) != 0) die("cannot read %s: %s", path, strerror(errno));
    if (!S_ISDIR(st.st_mode)) {
        if (!S_ISREG(st.st_mode) && !inside) die("cannot read %s: neither a file nor a folder", path);
        if (st.st_size == 0 && !inside) die("%s is empty: name a file with text in it", path);
        if (S_ISREG(st.st_mode) && st.st_size > 0) list_add(list, path);
        return;
    }
    int n = scandir(path, &entries, NULL, by_name);
    if (n < 0) die("cannot read folder %s: %s", path, strerror(errno));
    for (int i = 0; i < n; i++) {
        char child[PATH_BYTES];
        if (entries[i]->d_name[0] != '.') {
            int length = snprintf(child, sizeof(child), "%s/%s", path, entries[i]->d_name);
            if (length >= PATH_BYTES) die("file name too long: %s/%s", path, entries[i]->d_name);
            struct stat link;
            int loops = lstat(child, &link) == 0 && S_ISLNK(link.st_mode) && stat(child, &st) == 0 &&
                        S_ISDIR(st.st_mode);
            if (!loops) find_files(list, child, 1); // links to folders may lead back
        }
        free(entries[i]);
    }
    free(entries);
}

// One of the two series of shards. Finished ones wait under their temporary names until all are written.
typedef struct {
    const char *folder, *name, *part;
    ShardWriter **writers;
    int64_t shards, shard_tokens, tokens;
} Series;

static void series_path(const Series *s, int64_t shard, char *out) {
    int n = snprintf(out, PATH_BYTES, "%s/%s_%s_%06lld.bin", s->folder, s->name, s->part, (long long)shard);
    if (n >= PATH_BYTES) die("file name too long: %s/%s", s->folder, s->name);
}

static void series_add(Series *s, const int32_t *tokens, int64_t n) {
    while (n > 0) {
        ShardWriter *w = s->shards > 0 ? s->writers[s->shards - 1] : NULL;
        if (w == NULL || w->count == s->shard_tokens) {
            char path[PATH_BYTES];
            if (w != NULL) shard_writer_sync(w);
            s->writers = (ShardWriter **)realloc(s->writers, (size_t)(s->shards + 1) * sizeof(ShardWriter *));
            if (s->writers == NULL) die("out of memory for %lld shards", (long long)s->shards + 1);
            w = s->writers[s->shards] = (ShardWriter *)xmalloc(sizeof(ShardWriter));
            series_path(s, s->shards++, path);
            shard_writer_open(w, path, VOCAB_SIZE);
        }
        int64_t room = s->shard_tokens - w->count, some = n < room ? n : room;
        shard_writer_add(w, tokens, some);
        tokens += some;
        n -= some;
        s->tokens += some;
    }
}

// Puts the shards in their places and removes those of an earlier run that made more.
static void series_commit(Series *s) {
    for (int64_t i = 0; i < s->shards; i++) {
        shard_writer_commit(s->writers[i]);
        free(s->writers[i]);
    }
    free(s->writers);
    for (int64_t i = s->shards;; i++) {
        char path[PATH_BYTES];
        series_path(s, i, path);
        if (unlink(path) != 0) break;
    }
}

// Adds a file's bytes, the last `share` of them to val; each part begins with end-of-text.
static void add_file(const char *path, double share, Series *train, Series *val) {
    struct stat st;
    unsigned char bytes[4096];
    int32_t tokens[4096], eot = EOT;
    FILE *f = fopen(path, "rb");
    if (f == NULL || fstat(fileno(f), &st) != 0) die("cannot read %s: %s", path, strerror(errno));
    int64_t size = st.st_size, held_out = (int64_t)((double)size * share), done = 0;
    while (done < size) {
        Series *s = done < size - held_out ? train : val;
        int64_t end = s == train ? size - held_out : size;
        if (done == 0 || done == size - held_out) series_add(s, &eot, 1);
        size_t want = (size_t)(end - done < 4096 ? end - done : 4096);
        if (fread(bytes, 1, want, f) != want) die("cannot read %s at byte %lld", path, (long long)done);
        for (size_t i = 0; i < want; i++) tokens[i] = bytes[i];
        series_add(s, tokens, (int64_t)want);
        done += (int64_t)want;
    }
    fclose(f);
}

// A folder has one tokenizer: dies where it is another one than ours.
static void check_tokenizer(const char *folder) {
    char path[PATH_BYTES];
    Tokenizer t;
    if (snprintf(path, sizeof(path), "%s/tokenizer.bin", folder) >= PATH_BYTES) die("folder name too long");
    if (tokenizer_load(&t, path) != 0) return;
    if (t.kind != TOKENIZER_BYTES || t.vocab_size != VOCAB_SIZE || t.eot != EOT) {
        die("%s belongs to other data, of %d tokens: choose another folder with -o", path, t.vocab_size);
    }
    tokenizer_free(&t);
}

static void make_tokenizer(const char *folder) {
    char path[PATH_BYTES], bytes[256];
    const char *pieces[VOCAB_SIZE];
    int lengths[VOCAB_SIZE];
    for (int i = 0; i < 256; i++) {
        bytes[i] = (char)i;
        pieces[i] = &bytes[i];
        lengths[i] = 1;
    }
    pieces[EOT] = "<|endoftext|>";
    lengths[EOT] = (int)strlen(pieces[EOT]);
    if (snprintf(path, sizeof(path), "%s/tokenizer.bin", folder) >= PATH_BYTES) die("folder name too long");
    tokenizer_write(path, TOKENIZER_BYTES, VOCAB_SIZE, EOT, pieces, lengths, NULL);
}

static const char USAGE[] =
    "text -o DIR FILE_OR_FOLDER...: makes byte shards of text in DIR, and their tokenizer\n"
    "  -name NAME   shards are DIR/NAME_train_000000.bin, ..., DIR/NAME_val_000000.bin, ... (text)\n"
    "  -val SHARE   the last part of each file, held out for validation, 0 to 0.9 (0.1)\n"
    "  -shard N     most tokens in a shard (100000000)\n";

int main(int argc, char **argv) {
    const char *folder = NULL, *name = "text";
    double share = 0.1;
    int64_t shard_tokens = 100000000;
    FileList files = {NULL, 0, 0};
    for (int i = 1; i < argc; i++) {
        const char *flag = argv[i], *value = i + 1 < argc ? argv[i + 1] : NULL;
        if (strcmp(flag, "-h") == 0 || strcmp(flag, "-help") == 0 || strcmp(flag, "--help") == 0) {
            fputs(USAGE, stdout);
            return 0;
        }
        if (flag[0] != '-')
            find_files(&files, flag, 0);
        else if (strcmp(flag, "-o") == 0 && value != NULL)
            folder = argv[++i];
        else if (strcmp(flag, "-name") == 0 && value != NULL)
            name = argv[++i];
        else if (strcmp(flag, "-val") == 0)
            share = parse_double(flag, argv[++i], 0, 0.9);
        else if (strcmp(flag, "-shard") == 0)
            shard_tokens = parse_int(flag, argv[++i], 1024, INT32_MAX);
        else
            die("unknown flag or missing value: '%s'; text -h lists the flags", flag);
    }
    if (folder == NULL) die("-o DIR is missing: the folder for the shards, for example -o data/mytext");
    if (*name == 0 || strchr(name, '/') != NULL) die("-name takes a name without '/', not '%s'", name);
    if (files.count == 0) die("nothing to tokenize: name text files, or folders with text files in them");

    Series train = {folder, name, "train", NULL, 0, shard_tokens, 0};
    Series val = {folder, name, "val", NULL, 0, shard_tokens, 0};
    make_dirs(folder);
    check_tokenizer(folder);
    for (int64_t i = 0; i < files.count; i++) add_file(files.paths[i], share, &train, &val);
    make_tokenizer(folder);
    series_commit(&train);
    series_commit(&val);
    printf("%s: %lld files, %lld training tokens in %lld shards, %lld validation tokens in %lld\n", folder,
           (long long)files.count, (long long)train.tokens, (long long)train.shards, (long long)val.tokens,
           (long long)val.shards);
    for (int64_t i = 0; i < files.count; i++) free(files.paths[i]);
    free(files.paths);
    return 0;
}
