/* The five functions of libb64 that perf_analyzer links to, for machines without that library. perf_analyzer calls
 * them only for CUDA shared memory, which is not tested here; they are written to be right all the same. */

typedef struct { int step; unsigned char carry; } encode_state;
typedef struct { int step; unsigned char carry; } decode_state;

static const char ALPHABET[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

void base64_init_encodestate(encode_state *state) { state->step = 0; state->carry = 0; }

int base64_encode_block(const char *in, int length, char *out, encode_state *state) {
    char *at = out;
    for (int i = 0; i < length; i++) {
        unsigned char byte = (unsigned char)in[i];
        if (state->step == 0) {
            *at++ = ALPHABET[byte >> 2];
            state->carry = (byte & 3) << 4;
        } else if (state->step == 1) {
            *at++ = ALPHABET[state->carry | byte >> 4];
            state->carry = (byte & 15) << 2;
        } else {
            *at++ = ALPHABET[state->carry | byte >> 6];
            *at++ = ALPHABET[byte & 63];
            state->carry = 0;
        }
        state->step = (state->step + 1) % 3;
    }
    return (int)(at - out);
}

int base64_encode_blockend(char *out, encode_state *state) {
    char *at = out;
    if (state->step) {
        *at++ = ALPHABET[state->carry];
        if (state->step == 1) *at++ = '=';
        *at++ = '=';
    }
    *at++ = '\n';
    return (int)(at - out);
}

void base64_init_decodestate(decode_state *state) { state->step = 0; state->carry = 0; }

int base64_decode_block(const char *in, int length, char *out, decode_state *state) {
    char *at = out;
    for (int i = 0; i < length; i++) {
        int value = 0;
        while (value < 64 && ALPHABET[value] != in[i]) value++;
        if (value == 64) continue;
        if (state->step == 0) state->carry = (unsigned char)(value << 2);
        else if (state->step == 1) { *at++ = (char)(state->carry | value >> 4); state->carry = (unsigned char)(value << 4); }
        else if (state->step == 2) { *at++ = (char)(state->carry | value >> 2); state->carry = (unsigned char)(value << 6); }
        else *at++ = (char)(state->carry | value);
        state->step = (state->step + 1) % 4;
    }
    return (int)(at - out);
}
