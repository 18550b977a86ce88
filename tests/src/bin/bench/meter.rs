//! What a load costs besides its speed: repeated segments, copies, CPU.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use tests::Agent;
use tests::lab::SYNC_INTERFACE;
use tests::metrics::Metrics;
use tests::report::median;

use crate::process::{Machine, threads};
use crate::site::Site;

/// Counters at one moment.
pub struct Reading {
    at: Instant,
    client_repeats: u64,
    server_repeats: u64,
    active: Metrics,
    standby: Metrics,
    lost_on_cable: u64,
    /// CPU and sleeps, by process and name.
    threads: BTreeMap<String, (Duration, u64)>,
    machine: Machine,
}

/// What happened between two readings.
pub struct Usage {
    /// Segments that the client sent again.
    pub client_repeats: u64,
    /// The same of the server.
    pub server_repeats: u64,
    /// Frames that the standby read from its ring, per second.
    pub frames: f64,
    /// Copies that were lost: no room in the ring, on the cable, or not sent.
    pub lost: f64,
    /// Flows that the standby did not take.
    pub refused: f64,
    /// CPU of each thread, of one core, and how often it went to sleep, per second. Threads of one name are
    /// taken together.
    pub threads: BTreeMap<String, (f64, f64)>,
    /// Of all cores: in programs, in the kernel for them, in the kernel for packets, idle.
    pub machine: [f64; 4],
    /// How idle each core was.
    pub idle: Vec<f64>,
    /// Packets by what the ACK gate did with them, per second.
    pub verdicts: BTreeMap<String, f64>,
}

impl Reading {
    /// Now.
    ///
    /// # Errors
    /// When `/proc` cannot be read.
    pub fn take(site: &Site) -> Result<Self> {
        let metrics = |agent: Option<&Agent>| agent.map(Agent::metrics).unwrap_or_default();
        let mut by_name = BTreeMap::new();
        let processes = [
            ("client", Some(std::process::id())),
            ("server", Some(site.server_pid())),
            ("standby", site.standby().map(Agent::pid)),
        ];
        for (who, process) in processes {
            for thread in process.map(threads).transpose()?.into_iter().flatten() {
                let name = format!("{who} {}", thread.name);
                let (cpu, sleeps) = by_name.entry(name).or_insert((Duration::ZERO, 0));
                *cpu += thread.cpu;
                *sleeps += thread.sleeps;
            }
        }
        Ok(Self {
            at: Instant::now(),
            client_repeats: site.lab.client().repeated()?,
            server_repeats: site.lab.host(site.server_host()).repeated()?,
            active: metrics(site.active()),
            standby: metrics(site.standby()),
            lost_on_cable: lost_on_cable(site)?,
            threads: by_name,
            machine: Machine::read()?,
        })
    }

    /// From an earlier reading to this one.
    pub fn since(&self, before: &Reading) -> Usage {
        let seconds = (self.at - before.at).as_secs_f64();
        let grown = |scrape: fn(&Reading) -> &Metrics, name, labels: &[_]| {
            scrape(self).sum(name, labels) - scrape(before).sum(name, labels)
        };
        let threads = self.threads.iter().map(|(name, now)| {
            let then = before.threads.get(name).copied().unwrap_or_default();
            let cpu = now.0.saturating_sub(then.0).as_secs_f64() / seconds;
            let sleeps = now.1.saturating_sub(then.1) as f64 / seconds;
            (name.clone(), (cpu, sleeps))
        });
        let verdicts = self.active.changed_since(&before.active).into_iter();
        let verdicts = verdicts.filter_map(|(series, then, now)| {
            let label = series.strip_prefix("rfsis_ack_gate_packets_total{verdict=\"")?;
            Some((label.trim_end_matches("\"}").into(), (now - then) / seconds))
        });
        let (ring_full, not_sent) = ([("verdict", "mirror_lost")], [("verdict", "failed")]);
        Usage {
            client_repeats: self.client_repeats - before.client_repeats,
            server_repeats: self.server_repeats - before.server_repeats,
            frames: grown(|r| &r.standby, "rfsis_frames_total", &[]) / seconds,
            lost: grown(|r| &r.standby, "rfsis_xdp_packets_total", &ring_full)
                + grown(|r| &r.active, "rfsis_mirror_packets_total", &not_sent)
                + (self.lost_on_cable - before.lost_on_cable) as f64,
            refused: grown(|r| &r.active, "rfsis_guard_refused_total", &[]),
            threads: threads.collect(),
            machine: self.machine.shares(&before.machine),
            idle: self.machine.idle(&before.machine),
            verdicts: verdicts.collect(),
        }
    }
}

/// Frames on their way to the standby for which a queue had no room.
fn lost_on_cable(site: &Site) -> Result<u64> {
    let Some(standby) = site.standby() else {
        return Ok(0);
    };
    let file = format!("/sys/class/net/{SYNC_INTERFACE}/statistics/tx_dropped");
    let server = site.lab.host(site.server_host());
    // Missing where there is no such cable.
    let on_link = server.sh(&format!("cat {file}")).unwrap_or_default();
    let on_link = match on_link.trim() {
        "" => 0,
        number => number.parse().with_context(|| file.clone())?,
    };
    Ok(site.lab.lost_towards(standby.host()) + on_link)
}

/// One column of many usages, as its median.
pub fn typical(usages: &[&Usage], of: impl Fn(&Usage) -> f64) -> f64 {
    median(&usages.iter().map(|usage| of(usage)).collect::<Vec<_>>())
}

/// Threads that use less of a core are not listed.
const WORTH_SAYING: f64 = 0.02;

/// Heads of the columns that [`costs`] fills.
pub const COSTS: [&str; 4] = [
    "machine: programs, kernel, packets, idle",
    "idle, by CPU",
    "threads, of one core (sleeps/s)",
    "ACK gate, packets/s",
];

/// What was busy: medians of all usages.
pub fn costs(usages: &[&Usage]) -> [String; 4] {
    let share = |index: usize| format!("{:.0}", 100.0 * typical(usages, |u| u.machine[index]));
    let machine: Vec<String> = (0..4).map(share).collect();
    let cores = usages
        .iter()
        .map(|usage| usage.idle.len())
        .min()
        .unwrap_or(0);
    let idle = (0..cores).map(|core| format!("{:.0}", 100.0 * typical(usages, |u| u.idle[core])));
    let verdicts: BTreeSet<&String> = usages.iter().flat_map(|u| u.verdicts.keys()).collect();
    let verdicts = verdicts.into_iter().map(|verdict| {
        let rate = typical(usages, |u| u.verdicts.get(verdict).copied().unwrap_or(0.0));
        format!("{verdict} {rate:.0}")
    });
    [
        format!("{} %", machine.join(", ")),
        format!("{} %", idle.collect::<Vec<_>>().join(", ")),
        threads_of(usages).join(", "),
        verdicts.collect::<Vec<_>>().join(", "),
    ]
}

/// `server rfsis-shadows 34 % (5000)`, the busiest first.
fn threads_of(usages: &[&Usage]) -> Vec<String> {
    let names: BTreeSet<&String> = usages.iter().flat_map(|u| u.threads.keys()).collect();
    let column = |name: &String, of: fn(&(f64, f64)) -> f64| {
        typical(usages, |usage| usage.threads.get(name).map_or(0.0, of))
    };
    let mut busy: Vec<_> = names
        .into_iter()
        .map(|name| (column(name, |t| t.0), column(name, |t| t.1), name))
        .filter(|(cpu, ..)| *cpu >= WORTH_SAYING)
        .collect();
    busy.sort_by(|a, b| b.0.total_cmp(&a.0));
    busy.into_iter()
        .map(|(cpu, sleeps, name)| format!("{name} {:.0} % ({sleeps:.0})", 100.0 * cpu))
        .collect()
}
