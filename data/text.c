// text.c: converts text files to shards of byte tokens. A file is a document: an end-of-text token, then its
// bytes. The end of each file is held out for validation. data/README.md has the file formats.
#include "../llmc/shard.h"
#include "../llmc/tokenizer.h"
#include <signal.h>
#include <dirent.h>

enum { EOT = 256, VOCAB_SIZE = 257 };

typedef struct {
    char **paths;
    int64_t count, capacity;
} FileList;

static void file_list_add(FileList *list, const char *path) {
    if (list->count == list->capacity) {
        list->capacity = 2 * list->capacity + 64;
        list->paths = (char **)realloc(list->paths, (size_t)list->capacity * sizeof(char *));
        if (list->paths == NULL) die("out of memory for %lld file names", (long long)list->capacity);
    }
    char *copy = (char *)xmalloc(strlen(path) + 1);
    list->paths[list->count++] = strcpy(copy, path);
}

static int compare_names(const struct dirent **a, const struct dirent **b) {
    return strcmp((*a)->d_name, (*b)->d_name);
}

// Adds a file, or the files of a folder and its subfolders sorted by name. Hidden entries, empty files and
// links to folders or to nothing in a folder are skipped. in_folder = 0: the user named the path, and an
// empty file is an error.
static void find_files(FileList *list, const char *path, int in_folder) {
    struct stat st;
    struct dirent **entries;
    if (stat(path, &st) != 0) {
        if (in_folder && errno == ENOENT) return; // a link to nothing
        die("cannot read %s: %s", path, strerror(errno));
    }
    if (!S_ISDIR(st.st_mode)) {
        if (!S_ISREG(st.st_mode) && !in_folder) die("cannot read %s: neither a file nor a folder", path);
        if (st.st_size == 0 && !in_folder) die("%s is empty; name a file with text in it", path);
        if (S_ISREG(st.st_mode) && st.st_size > 0) file_list_add(list, path);
        return;
    }
    int n = scandir(path, &entries, NULL, compare_names);
    if (n < 0) die("cannot read folder %s: %s", path, strerror(errno));
    for (int i = 0; i < n; i++) {
        char child[PATH_BYTES];
        if (entries[i]->d_name[0] != '.') {
            int length = snprintf(child, sizeof(child), "%s/%s", path, entries[i]->d_name);
            if (length >= PATH_BYTES) die("%s/%s: path is too long", path, entries[i]->d_name);
            struct stat link;
            int folder_link = lstat(child, &link) == 0 && S_ISLNK(link.st_mode) && stat(child, &st) == 0 &&
                              S_ISDIR(st.st_mode);
            if (!folder_link) find_files(list, child, 1); // a link to a folder could form a cycle
        }
        free(entries[i]);
    }
    free(entries);
}

// The training or the validation shards. A finished shard keeps its temporary name until all are written.
typedef struct {
    const char *folder, *name, *part; // part: "train" or "val"
    ShardWriter **writers;            // [shards]
    int64_t shards;
    int64_t max_shard_tokens;
    int64_t tokens; // in all shards
} ShardSet;

// Writes the path of a shard to out [PATH_BYTES].
static void shard_set_path(const ShardSet *s, int64_t shard, char *out) {
    int n = snprintf(out, PATH_BYTES, "%s/%s_%s_%06lld.bin", s->folder, s->name, s->part, (long long)shard);
    if (n >= PATH_BYTES) die("%s/%s: path is too long; use a shorter -o or -name", s->folder, s->name);
}

// Appends tokens [n]. Opens a new shard when the current one is full.
static void shard_set_add(ShardSet *s, const int32_t *tokens, int64_t n) {
    while (n > 0) {
        ShardWriter *w = s->shards > 0 ? s->writers[s->shards - 1] : NULL;
        if (w == NULL || w->count == s->max_shard_tokens) {
            char path[PATH_BYTES];
            if (w != NULL) shard_writer_sync(w);
            s->writers = (ShardWriter **)realloc(s->writers, (size_t)(s->shards + 1) * sizeof(ShardWriter *));
            if (s->writers == NULL) die("out of memory for %lld shards", (long long)s->shards + 1);
            w = s->writers[s->shards] = (ShardWriter *)xmalloc(sizeof(ShardWriter));
            shard_set_path(s, s->shards++, path);
            shard_writer_open(w, path, VOCAB_SIZE);
        }
        int64_t remaining = s->max_shard_tokens - w->count, chunk = n < remaining ? n : remaining;
        shard_writer_add(w, tokens, chunk);
        tokens += chunk;
        n -= chunk;
        s->tokens += chunk;
    }
}

// Returns whether `name` is the name of a shard of the set, followed by `suffix`.
static int shard_set_has_name(const ShardSet *s, const char *name, const char *suffix) {
    size_t name_bytes = strlen(s->name), part_bytes = strlen(s->part);
    if (strncmp(name, s->name, name_bytes) != 0 || name[name_bytes] != '_') return 0;
    name += name_bytes + 1;
    if (strncmp(name, s->part, part_bytes) != 0 || name[part_bytes] != '_') return 0;
    name += part_bytes + 1;
    size_t digits = strspn(name, "0123456789");
    return digits >= 6 && strncmp(name + digits, ".bin", 4) == 0 && strcmp(name + digits + 4, suffix) == 0;
}

// Removes the shards that an earlier run left in the folder under their names and `suffix`.
static void shard_set_remove(const ShardSet *s, const char *suffix) {
    struct dirent **entries;
    int n = scandir(s->folder, &entries, NULL, compare_names);
    if (n < 0) die("cannot read folder %s: %s", s->folder, strerror(errno));
    for (int i = n - 1; i >= 0; i--) {
        char path[PATH_BYTES];
        if (shard_set_has_name(s, entries[i]->d_name, suffix)) {
            if (snprintf(path, sizeof(path), "%s/%s", s->folder, entries[i]->d_name) >= PATH_BYTES)
                die("%s/%s: path is too long; use a shorter -o", s->folder, entries[i]->d_name);
            if (unlink(path) != 0)
                die("cannot remove the old shard %s: %s; remove it yourself", path, strerror(errno));
        }
        free(entries[i]);
    }
    free(entries);
}

// Completes the last shard, which keeps its temporary name.
static void shard_set_sync(ShardSet *s) {
    if (s->shards > 0 && s->writers[s->shards - 1]->file.f != NULL)
        shard_writer_sync(s->writers[s->shards - 1]);
}

// Renames the shards from their temporary names.
static void shard_set_commit(ShardSet *s) {
    for (int64_t i = 0; i < s->shards; i++) {
        shard_writer_commit(s->writers[i]);
        free(s->writers[i]);
    }
    free(s->writers);
}

// Adds a file's bytes: the last val_fraction of them to val, the others to train. Each part begins with
// end-of-text.
static void add_file(const char *path, double val_fraction, ShardSet *train, ShardSet *val) {
    struct stat st;
    unsigned char bytes[4096];
    int32_t tokens[4096], eot = EOT;
    FILE *f = input_fopen("", path, &st);
    if (f == NULL) die("cannot read %s: %s", path, strerror(errno));
    int64_t size = st.st_size, held_out = (int64_t)((double)size * val_fraction), done = 0;
    while (done < size) {
        ShardSet *s = done < size - held_out ? train : val;
        int64_t end = s == train ? size - held_out : size;
        if (done == 0 || done == size - held_out) shard_set_add(s, &eot, 1);
        size_t chunk = (size_t)(end - done < 4096 ? end - done : 4096);
        if (fread(bytes, 1, chunk, f) != chunk)
            die("cannot read %s at byte %lld; has it become shorter?", path, (long long)done);
        for (size_t i = 0; i < chunk; i++) tokens[i] = bytes[i];
        shard_set_add(s, tokens, (int64_t)chunk);
        done += (int64_t)chunk;
    }
    fclose(f);
}

// A folder has one tokenizer. Dies if the folder has a tokenizer other than the byte tokenizer.
static void check_tokenizer(const char *folder) {
    char path[PATH_BYTES];
    Tokenizer t;
    if (snprintf(path, sizeof(path), "%s/tokenizer.bin", folder) >= PATH_BYTES)
        die("-o: folder name is too long; use a shorter one");
    if (tokenizer_load(&t, path) != 0) return;
    if (t.kind != TOKENIZER_BYTES || t.vocab_size != VOCAB_SIZE || t.eot != EOT) {
        die("%s belongs to other data (vocabulary of %d tokens); choose another folder with -o", path,
            t.vocab_size);
    }
    tokenizer_free(&t);
}

// Writes the byte tokenizer: a token for each byte, and end-of-text.
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
    if (snprintf(path, sizeof(path), "%s/tokenizer.bin", folder) >= PATH_BYTES)
        die("-o: folder name is too long; use a shorter one");
    tokenizer_write(path, TOKENIZER_BYTES, VOCAB_SIZE, EOT, pieces, lengths, NULL);
}

static const char USAGE[] =
    "text -o DIR FILE_OR_FOLDER...: converts text to byte shards in DIR, with their tokenizer\n"
    "  -name NAME   shards are DIR/NAME_train_000000.bin, ..., DIR/NAME_val_000000.bin, ... (text)\n"
    "  -val X       fraction of each file, at its end, held out for validation, 0 to 0.9 (0.1)\n"
    "  -shard N     maximum number of tokens in a shard (100000000)\n";

int main(int argc, char **argv) {
    const char *folder = NULL, *name = "text";
    double val_fraction = 0.1;
    int64_t max_shard_tokens = 100000000;
    FileList files = {NULL, 0, 0};
    open_standard_files();
    signal(SIGPIPE, SIG_IGN); // a write to a closed pipe is an error, which finish_stdout reports
    for (int i = 1; i < argc; i++) {
        const char *flag = argv[i], *value = i + 1 < argc ? argv[i + 1] : NULL;
        if (strcmp(flag, "-h") == 0 || strcmp(flag, "-help") == 0 || strcmp(flag, "--help") == 0) {
            fputs(USAGE, stdout);
            finish_stdout();
            return 0;
        }
        if (flag[0] != '-')
            find_files(&files, flag, 0);
        else if (strcmp(flag, "-o") == 0 && value != NULL)
            folder = argv[++i];
        else if (strcmp(flag, "-name") == 0 && value != NULL)
            name = argv[++i];
        else if (strcmp(flag, "-val") == 0)
            val_fraction = parse_double(flag, argv[++i], 0, 0.9);
        else if (strcmp(flag, "-shard") == 0)
            max_shard_tokens = parse_int(flag, argv[++i], 1024, INT32_MAX);
        else
            die("unknown flag '%s', or its value is missing; text -h lists the flags", flag);
    }
    if (folder == NULL) die("-o DIR is missing; name the folder for the shards, for example -o data/mytext");
    if (*name == 0 || strchr(name, '/') != NULL) die("-name %s: must not be empty or contain '/'", name);
    if (files.count == 0) die("nothing to tokenize; name text files, or folders with text files");

    ShardSet train = {folder, name, "train", NULL, 0, max_shard_tokens, 0};
    ShardSet val = {folder, name, "val", NULL, 0, max_shard_tokens, 0};
    make_dirs(folder);
    folder_lock("-o", folder);
    check_tokenizer(folder);
    shard_set_remove(&train, ".tmp"); // of a run that was killed
    shard_set_remove(&val, ".tmp");
    for (int64_t i = 0; i < files.count; i++) add_file(files.paths[i], val_fraction, &train, &val);
    make_tokenizer(folder);
    // All old shards are removed before the first new one gets its name. So a run that is killed here leaves
    // old shards or new ones, never both.
    shard_set_sync(&train);
    shard_set_sync(&val);
    shard_set_remove(&train, "");
    shard_set_remove(&val, "");
    shard_set_commit(&train);
    shard_set_commit(&val);
    printf("%s: %lld file%s, %lld training tokens in %lld shard%s, %lld validation tokens in %lld\n", folder,
           (long long)files.count, files.count == 1 ? "" : "s", (long long)train.tokens,
           (long long)train.shards, train.shards == 1 ? "" : "s", (long long)val.tokens,
           (long long)val.shards);
    for (int64_t i = 0; i < files.count; i++) free(files.paths[i]);
    free(files.paths);
    finish_stdout();
    return 0;
}
