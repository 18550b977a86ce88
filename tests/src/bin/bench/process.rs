//! What a running program takes from its host.

use std::time::Duration;

use anyhow::{Context, Result};
use nix::unistd::Pid;
use tests::Agent;

/// utime + stime (proc_pid_stat(5), fields 14 and 15).
pub fn cpu_time(agent: &Agent) -> Result<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", agent.pid()))?;
    Ok(cpu_of(&stat)?.1)
}

/// Name and utime + stime of a `stat` file of proc_pid_stat(5).
fn cpu_of(stat: &str) -> Result<(&str, Duration)> {
    // The name in parentheses may hold blanks; fields are counted behind it.
    let (head, fields) = stat.rsplit_once(") ").context("/proc/PID/stat")?;
    let (_, name) = head.split_once('(').context("/proc/PID/stat")?;
    let mut ticks = 0;
    for field in fields.split(' ').skip(11).take(2) {
        ticks += field.parse::<u64>().context("/proc/PID/stat")?;
    }
    let hertz = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK)?.context("CLK_TCK")?;
    Ok((name, Duration::from_secs_f64(ticks as f64 / hertz as f64)))
}

/// A thread, since it began.
#[derive(Clone, Debug)]
pub struct Thread {
    /// As the system calls mean it.
    pub id: Pid,
    /// As `ps` shows it.
    pub name: String,
    /// utime + stime.
    pub cpu: Duration,
    /// How often it went to sleep (voluntary_ctxt_switches).
    pub sleeps: u64,
}

/// The threads of a process. One that ends meanwhile is left out.
pub fn threads(process: u32) -> Result<Vec<Thread>> {
    let mut threads = Vec::new();
    for task in std::fs::read_dir(format!("/proc/{process}/task"))? {
        let task = task?;
        let id = Pid::from_raw(task.file_name().to_string_lossy().parse()?);
        let task = task.path();
        let read = |file| std::fs::read_to_string(task.join(file));
        let (Ok(stat), Ok(status)) = (read("stat"), read("status")) else {
            continue;
        };
        let (name, cpu) = cpu_of(&stat)?;
        threads.push(Thread {
            id,
            name: name.to_owned(),
            cpu,
            sleeps: voluntary_switches(&status)?,
        });
    }
    Ok(threads)
}

fn voluntary_switches(status: &str) -> Result<u64> {
    let count = status
        .lines()
        .find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"))
        .context("no voluntary_ctxt_switches")?;
    Ok(count.trim().parse()?)
}

/// How often the thread of this name has gone to sleep.
pub fn sleeps(agent: &Agent, thread: &str) -> Result<u64> {
    let threads = threads(agent.pid())?;
    let found = threads.iter().find(|known| known.name == thread);
    Ok(found
        .with_context(|| format!("the agent has no thread {thread}"))?
        .sleeps)
}

/// What the cores have done since they were started: clock ticks of all together and of each.
#[derive(Clone, Debug)]
pub struct Machine {
    all: [f64; 4],
    each: Vec<[f64; 4]>,
}

impl Machine {
    /// The lines `cpu` of `/proc/stat`, proc_stat(5).
    pub fn read() -> Result<Self> {
        let stat = std::fs::read_to_string("/proc/stat")?;
        let lines = stat.lines().take_while(|line| line.starts_with("cpu"));
        let mut lines = lines.map(Self::line);
        Ok(Self {
            all: lines.next().context("/proc/stat is empty")??,
            each: lines.collect::<Result<_>>()?,
        })
    }

    /// Ticks in programs, in the kernel for them, in the kernel for packets, idle.
    fn line(line: &str) -> Result<[f64; 4]> {
        let ticks = line.split_whitespace().skip(1).map(str::parse::<f64>);
        let ticks: Vec<f64> = ticks.collect::<Result<_, _>>().context("/proc/stat")?;
        match ticks[..] {
            [user, nice, system, idle, wait, interrupts, softirqs, ..] => {
                Ok([user + nice, system, interrupts + softirqs, idle + wait])
            }
            _ => anyhow::bail!("/proc/stat: {line:?}"),
        }
    }

    /// Shares since `before`: of programs, of the kernel for them, of packets, of nothing.
    pub fn shares(&self, before: &Machine) -> [f64; 4] {
        shares(&self.all, &before.all)
    }

    /// How idle each core was since `before`.
    pub fn idle(&self, before: &Machine) -> Vec<f64> {
        let pairs = self.each.iter().zip(&before.each);
        pairs.map(|(now, then)| shares(now, then)[3]).collect()
    }
}

fn shares(now: &[f64; 4], then: &[f64; 4]) -> [f64; 4] {
    let spent: [f64; 4] = std::array::from_fn(|index| now[index] - then[index]);
    let total = spent.iter().sum::<f64>().max(1.0);
    spent.map(|ticks| ticks / total)
}
