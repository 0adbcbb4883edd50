// results.h: appends measurements to dev/results, one JSON object per line.
#ifndef LLMC_RESULTS_H
#define LLMC_RESULTS_H
#include "utils.h"
#include <ctype.h>

// Opens dev/results/GPU.jsonl for appending and writes the start of a line: the commit, the date, the GPU's
// name, the number of GPUs and the program. The caller writes the rest of the line. Environment variables:
// RESULTS names another file ("": none), COMMIT overrides `commit`. Returns NULL if RESULTS is "" or, with a
// message, if the file cannot be opened.
static inline FILE *results_open(const char *gpu, int gpus, const char *program, const char *commit) {
    static const char *const known[] = {"GB200", "B200", "H200", "H100", "A100"};
    char file[64] = "gpu", path[PATH_BYTES], date[32];
    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++) {
        if (!strstr(gpu, known[i])) continue;
        for (size_t j = 0; j <= strlen(known[i]); j++) file[j] = (char)tolower((unsigned char)known[i][j]);
        break;
    }
    const char *given = getenv("RESULTS");
    if (getenv("COMMIT")) commit = getenv("COMMIT");
    if (given && !given[0]) return NULL;
    if (given)
        snprintf(path, sizeof path, "%s", given);
    else
        snprintf(path, sizeof path, "dev/results/%s.jsonl", file);
    FILE *f = fopen(path, "a");
    if (!f) {
        printf("not recorded: cannot append to %s: %s; set RESULTS to another file\n", path, strerror(errno));
        return NULL;
    }
    time_t now = time(NULL);
    strftime(date, sizeof date, "%Y-%m-%d", gmtime(&now));
    fprintf(f, "{\"commit\":\"%s\",\"date\":\"%s\",\"gpu\":\"%s\",\"gpus\":%d,\"program\":\"%s\"", commit,
            date, gpu, gpus, program);
    return f;
}
#endif
