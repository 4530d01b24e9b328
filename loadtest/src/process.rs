//! Processes from outside: their processor time and memory, which processors they may use, and
//! children that end with their owner.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::time::{ClockId, clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;

/// A process that is measured.
#[derive(Clone, Copy, Debug)]
pub struct Process {
    pid: u32,
    clock: ClockId,
}

/// Processor time used so far.
#[derive(Clone, Copy, Debug)]
pub struct Cpu {
    /// User and system time of all threads, ended ones too, to the nanosecond.
    pub total: Duration,
    /// System time in clock ticks of 10 ms.
    pub system: Duration,
}

impl Process {
    /// # Errors
    /// When there is no such process.
    pub fn new(pid: u32) -> Result<Self> {
        let id = Pid::from_raw(i32::try_from(pid)?);
        let clock =
            clock_getcpuclockid(id).with_context(|| format!("there is no process {pid}"))?;
        Ok(Self { pid, clock })
    }

    /// # Errors
    /// When the process has ended.
    pub fn cpu(&self) -> Result<Cpu> {
        let total =
            clock_gettime(self.clock).with_context(|| format!("process {} has ended", self.pid))?;
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid))?;
        // The name may hold anything, also spaces and brackets; the rest is fields.
        let fields = stat.rsplit_once(')').context("/proc stat without a name")?.1;
        let stime: u64 = fields.split_whitespace().nth(12).context("/proc stat is cut")?.parse()?;
        Ok(Cpu { total: total.into(), system: Duration::from_millis(stime * 10) })
    }

    /// Resident memory in MiB.
    ///
    /// # Errors
    /// When the process has ended.
    pub fn rss_mib(&self) -> Result<f64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.and_then(|line| line.split_whitespace().next());
        Ok(kib.context("/proc status without VmRSS")?.parse::<f64>()? / 1024.0)
    }
}

/// Children that run now, so that a signal can end them too.
static CHILDREN: Mutex<Vec<u32>> = Mutex::new(Vec::new());

fn children() -> MutexGuard<'static, Vec<u32>> {
    CHILDREN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// From now on SIGINT and SIGTERM end the children and then this process. To be called before
/// any other thread starts.
///
/// # Errors
/// When the operating system refuses.
pub fn end_children_on_signals() -> Result<()> {
    let signals: SigSet = [Signal::SIGINT, Signal::SIGTERM].into_iter().collect();
    // Children start without the mask: the standard library clears it.
    signals.thread_block()?;
    std::thread::spawn(move || {
        let signal = signals.wait().unwrap_or(Signal::SIGTERM);
        for pid in children().drain(..) {
            let ended = i32::try_from(pid).map(|pid| kill(Pid::from_raw(pid), Signal::SIGKILL));
            if !matches!(ended, Ok(Ok(()))) {
                eprintln!("cannot end process {pid}");
            }
        }
        std::process::exit(128 + signal as i32);
    });
    Ok(())
}

/// A child process that is killed when this is dropped.
pub struct Running {
    child: Child,
    pub process: Process,
}

impl Running {
    /// Starts `command`, on the processors of `cpus` only when given.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(mut command: Command, cpus: Option<&CpuSet>) -> Result<Self> {
        let child = spawn(&mut command, cpus)?;
        let process = Process::new(child.id())?;
        Ok(Self { child, process })
    }

    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        forget(self.child.id());
        if self.child.kill().and_then(|()| self.child.wait()).is_err() {
            eprintln!("cannot end process {}", self.child.id());
        }
    }
}

/// Processor time that the whole machine has spent on work so far, what a host took away included.
///
/// # Errors
/// When `/proc/stat` cannot be read.
pub fn machine_busy() -> Result<Duration> {
    let stat = std::fs::read_to_string("/proc/stat")?;
    busy(&stat).context("/proc/stat without a line for all processors")
}

/// user nice system idle iowait irq softirq steal, in ticks of 10 ms.
fn busy(stat: &str) -> Option<Duration> {
    let fields = stat.lines().find_map(|line| line.strip_prefix("cpu "))?;
    let ticks: Vec<u64> = fields.split_whitespace().map_while(|text| text.parse().ok()).collect();
    let worked = [0, 1, 2, 5, 6, 7].map(|at| ticks.get(at).copied());
    let sum: Option<u64> = worked.into_iter().sum();
    Some(Duration::from_millis(sum? * 10))
}

/// Runs `command` to its end, on the processors of `cpus` only when given.
///
/// # Errors
/// When it cannot be started.
pub fn output(command: &mut Command, cpus: Option<&CpuSet>) -> Result<Output> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = spawn(command, cpus)?;
    let pid = child.id();
    let output = child.wait_with_output();
    forget(pid);
    Ok(output?)
}

fn spawn(command: &mut Command, cpus: Option<&CpuSet>) -> Result<Child> {
    // A child has its parent's affinity from its first instruction on.
    let own = sched_getaffinity(Pid::from_raw(0))?;
    if let Some(cpus) = cpus {
        pin(cpus)?;
    }
    let spawned = command.spawn().with_context(|| format!("cannot start {command:?}"));
    pin(&own)?;
    let child = spawned?;
    children().push(child.id());
    Ok(child)
}

fn forget(pid: u32) {
    children().retain(|child| *child != pid);
}

/// Lets this thread, and those that it starts, run on `cpus` only.
///
/// # Errors
/// When the machine has none of them.
pub fn pin(cpus: &CpuSet) -> Result<()> {
    sched_setaffinity(Pid::from_raw(0), cpus).context("cannot use these processors")
}

/// A set of processors such as `0`, `0,2` or `1-3`.
///
/// # Errors
/// When `text` is no such list.
pub fn cpu_set(text: &str) -> Result<CpuSet> {
    let mut set = CpuSet::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let number = |text: &str| text.trim().parse::<usize>().with_context(|| wanted(text));
        let (first, last) = (number(first)?, number(last)?);
        ensure!(first <= last, wanted(part));
        for cpu in first..=last {
            set.set(cpu).with_context(|| format!("there is no processor {cpu}"))?;
        }
    }
    Ok(set)
}

fn wanted(got: &str) -> String {
    format!("expected processors such as 0,2-3, got '{got}'")
}

/// A loopback address that was free a moment ago.
///
/// # Errors
/// When the machine has no port left.
pub fn free_address() -> Result<SocketAddr> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processor_time_of_another_process_is_seen_and_grows() {
        let mut command = Command::new("sh");
        command.args(["-c", "while :; do :; done"]);
        let mut busy = Running::start(command, None).unwrap();
        let first = busy.process.cpu().unwrap().total;
        // Waits for what it needs, however slow the machine is.
        while busy.process.cpu().unwrap().total < first + Duration::from_millis(20) {
            assert!(busy.is_running());
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(busy.process.rss_mib().unwrap() > 0.1);
    }

    #[test]
    fn idle_time_is_no_work() {
        let stat = "cpu  10 1 5 9000 80 2 3 4 7 0\ncpu0 1 1 1 1 1 1 1 1 1 1\n";
        assert_eq!(busy(stat), Some(Duration::from_millis(250)));
        assert_eq!(busy("cpu  1 2"), None);
        assert!(machine_busy().unwrap() > Duration::ZERO);
    }

    #[test]
    fn lists_of_processors() {
        let set = cpu_set("0,2-3").unwrap();
        let got: Vec<bool> = (0..5).map(|cpu| set.is_set(cpu).unwrap()).collect();
        assert_eq!(got, [true, false, true, true, false]);
        for wrong in ["", "a", "3-1", "0,,1"] {
            let error = format!("{:#}", cpu_set(wrong).err().unwrap());
            assert!(error.contains("expected processors"), "{wrong}: {error}");
        }
    }

    #[test]
    fn a_process_that_is_not_there_is_named() {
        let error = Process::new(4_194_303).err().unwrap().to_string();
        assert!(error.contains("4194303"), "{error}");
    }
}
