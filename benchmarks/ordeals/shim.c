/* Counts the system calls of this process that change the disk, and at a given one kills it, tears the write, or says
 * that the disk is full. A seccomp filter raises SIGSYS for each such call, whichever library makes it and in whichever
 * thread; the handler decides, and makes the call itself from the one place that the filter lets through.
 * Linux on x86-64. Once watching, always watching: nothing that is executed afterwards would have the handler. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <ucontext.h>
#include <unistd.h>

enum { OFF, COUNT, KILL, TEAR, FULL };

static volatile int mode;
static volatile long at;
static long seen; /* atomic */

long shim_raw(long nr, long a, long b, long c, long d, long e, long f);
extern char shim_after[];
__asm__(".text\n.globl shim_raw\n.type shim_raw,@function\nshim_raw:\n"
        "mov %rdi,%rax\nmov %rsi,%rdi\nmov %rdx,%rsi\nmov %rcx,%rdx\nmov %r8,%r10\nmov %r9,%r8\nmov 8(%rsp),%r9\n"
        "syscall\n.globl shim_after\nshim_after:\nret\n");

struct call { long nr; const char *name; int writes; int flags; }; /* flags: the argument that holds O_…, or -1 */
static const struct call calls[] = {
    {SYS_write, "write", 1, -1},         {SYS_pwrite64, "pwrite", 1, -1},   {SYS_writev, "writev", 1, -1},
    {SYS_pwritev, "pwritev", 1, -1},     {SYS_pwritev2, "pwritev2", 1, -1}, {SYS_sendfile, "sendfile", 1, -1},
    {SYS_copy_file_range, "copy", 1, -1}, {SYS_fallocate, "fallocate", 1, -1},
    {SYS_open, "open", 0, 1},            {SYS_openat, "openat", 0, 2},      {SYS_creat, "creat", 0, -1},
    {SYS_fsync, "fsync", 0, -1},         {SYS_fdatasync, "fdatasync", 0, -1}, {SYS_ftruncate, "ftruncate", 0, -1},
    {SYS_truncate, "truncate", 0, -1},   {SYS_rename, "rename", 0, -1},     {SYS_renameat, "renameat", 0, -1},
    {SYS_renameat2, "renameat2", 0, -1}, {SYS_unlink, "unlink", 0, -1},     {SYS_unlinkat, "unlinkat", 0, -1},
    {SYS_mkdir, "mkdir", 0, -1},         {SYS_mkdirat, "mkdirat", 0, -1},   {SYS_rmdir, "rmdir", 0, -1},
    {SYS_link, "link", 0, -1},           {SYS_linkat, "linkat", 0, -1},     {SYS_symlink, "symlink", 0, -1},
    {SYS_symlinkat, "symlinkat", 0, -1},
};
enum { CALLS = sizeof calls / sizeof *calls };

static int regular(long fd) { /* not a terminal, a pipe or a log on standard error */
  struct stat found;
  return fd > 2 && !fstat((int)fd, &found) && S_ISREG(found.st_mode);
}

static int by_descriptor(long nr) {
  return nr == SYS_write || nr == SYS_pwrite64 || nr == SYS_writev || nr == SYS_pwritev || nr == SYS_pwritev2 ||
         nr == SYS_sendfile || nr == SYS_fallocate || nr == SYS_ftruncate;
}

static void say(const char *what, long number, const char *name) {
  char line[128];
  int length = snprintf(line, sizeof line, "shim: %s at call %ld (%s)\n", what, number, name);
  shim_raw(SYS_write, 2, (long)line, length, 0, 0, 0);
}

static void die(const char *what, long number, const char *name) {
  say(what, number, name);
  shim_raw(SYS_kill, shim_raw(SYS_getpid, 0, 0, 0, 0, 0, 0), SIGKILL, 0, 0, 0, 0);
  for (;;) shim_raw(SYS_pause, 0, 0, 0, 0, 0, 0);
}

static long half_of(long nr, const long *a) { /* of what a write was to write */
  struct iovec first;
  switch (nr) {
  case SYS_write: return shim_raw(nr, a[0], a[1], a[2] / 2, 0, 0, 0);
  case SYS_pwrite64: return shim_raw(nr, a[0], a[1], a[2] / 2, a[3], 0, 0);
  case SYS_writev:
  case SYS_pwritev:
  case SYS_pwritev2:
    first = *(struct iovec *)a[1];
    first.iov_len /= 2;
    return shim_raw(nr, a[0], (long)&first, 1, a[3], a[4], a[5]);
  default: return 0;
  }
}

static void trapped(int number, siginfo_t *info, void *context) {
  (void)number;
  greg_t *r = ((ucontext_t *)context)->uc_mcontext.gregs;
  long nr = info->si_syscall, a[6] = {r[REG_RDI], r[REG_RSI], r[REG_RDX], r[REG_R10], r[REG_R8], r[REG_R9]};
  const struct call *call = calls;
  while (call < calls + CALLS && call->nr != nr) call++;
  int kept = errno, now = mode;
  int counts = now != OFF && !(by_descriptor(nr) && !regular(a[0]));
  if (counts && (now == TEAR || now == FULL)) counts = call->writes;
  long mine = counts ? __atomic_add_fetch(&seen, 1, __ATOMIC_SEQ_CST) : 0, result;
  if (counts && now == KILL && mine == at) die("killed", mine, call->name);
  if (counts && now == TEAR && mine == at) {
    half_of(nr, a);
    die("torn", mine, call->name);
  }
  if (counts && now == FULL && mine >= at) {
    if (mine == at) say("disk full", mine, call->name);
    result = -ENOSPC;
  } else {
    result = shim_raw(nr, a[0], a[1], a[2], a[3], a[4], a[5]);
  }
  errno = kept;
  r[REG_RAX] = result;
}

#define LOAD(what) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, (what))
#define IF_EQUAL(value, yes, no) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (value), (yes), (no))
#define RETURN(what) BPF_STMT(BPF_RET | BPF_K, (what))

static int install(void) {
  uint64_t after = (uint64_t)(uintptr_t)shim_after;
  struct sock_filter filter[16 + 4 * CALLS], *end = filter;
#define ADD(...) *end++ = (struct sock_filter)__VA_ARGS__
  ADD(LOAD(offsetof(struct seccomp_data, instruction_pointer)));
  ADD(IF_EQUAL((uint32_t)after, 0, 3));
  ADD(LOAD(offsetof(struct seccomp_data, instruction_pointer) + 4));
  ADD(IF_EQUAL((uint32_t)(after >> 32), 0, 1));
  ADD(RETURN(SECCOMP_RET_ALLOW));
  ADD(LOAD(offsetof(struct seccomp_data, nr)));
  for (int i = 0; i < CALLS; i++) {
    if (calls[i].flags < 0) {
      ADD(IF_EQUAL((uint32_t)calls[i].nr, 0, 1));
    } else { /* opened to be read: it changes nothing */
      ADD(IF_EQUAL((uint32_t)calls[i].nr, 0, 4));
      ADD(LOAD(offsetof(struct seccomp_data, args) + 8 * calls[i].flags));
      ADD(BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, O_WRONLY | O_RDWR | O_CREAT | O_TRUNC, 1, 0));
      ADD(RETURN(SECCOMP_RET_ALLOW));
    }
    ADD(RETURN(SECCOMP_RET_TRAP));
  }
  ADD(RETURN(SECCOMP_RET_ALLOW));
  struct sock_fprog program = {(unsigned short)(end - filter), filter};
  if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)) return errno;
  return syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &program) ? errno : 0;
}

/* From now on; 0, or errno where the kernel refuses. */
int shim_arm(int what, long number) {
  static int watching;
  struct sigaction action = {0};
  action.sa_sigaction = trapped;
  action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_RESTART;
  sigemptyset(&action.sa_mask);
  if (sigaction(SIGSYS, &action, NULL)) return errno;
  if (!watching) {
    int refused = install();
    if (refused) return refused;
    watching = 1;
  }
  seen = 0;
  at = number;
  mode = what;
  return 0;
}

/* Not any more; how many there were. */
long shim_disarm(void) {
  mode = OFF;
  return seen;
}
