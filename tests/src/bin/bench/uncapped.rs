//! Bulk data as fast as this machine's CPUs allow: what the ACK gate costs, and what is short.

use anyhow::{Context, Result};
use tests::report::{Figure, median, range, row, table};

use crate::bulk::{Bulk, Way, load};
use crate::meter::{COSTS, Usage, costs, typical};
use crate::site::{Arm, Turns, ratios};

const ARMS: [Arm; 4] = [Arm::Bare, Arm::Async, Arm::Sync, Arm::SyncLink];
const CONNECTIONS: [usize; 2] = [1, 8];
/// Reno fills whatever window there is. BBR, the default of some machines, does not over a path of 40 µs, and leaves
/// CPUs idle (`docs/benchmarks.md`).
const UNPACED: &str = "reno";
const DEFAULT: &str = "/proc/sys/net/ipv4/tcp_congestion_control";
/// Above this a median says no more.
const ROUNDS_MOST: usize = 7;
/// Gate and mirror, of the mirror alone.
const TARGET: f64 = 0.9;

pub fn measure(runs: usize) -> Result<Vec<Figure>> {
    let rounds = runs.min(ROUNDS_MOST);
    println!(
        "### Bulk TCP without a limit, offloads on, endpoints pinned: median (least–greatest) of {rounds} \
         paired rounds\n"
    );
    let mut speeds = vec![row([
        "congestion control",
        "way",
        "connections",
        "protection",
        "Gbit/s",
        "of bare",
        "of mirror, async",
        "client's retransmissions",
        "server's",
        "frames/s that the standby reads",
        "copies lost",
    ])];
    let head = row(["congestion control", "way", "connections", "protection"]);
    let mut spent = vec![[&head[..], &row(COSTS)].concat()];
    let (mut figures, mut turns) = (Vec::new(), Turns::new(&ARMS));
    let default = std::fs::read_to_string(DEFAULT).with_context(|| format!("reading {DEFAULT}"))?;
    let mut controls = vec![UNPACED, default.trim()];
    controls.dedup();
    for (control, way, connections) in cases(&controls) {
        let outcomes = turns.measure(rounds, |site| {
            site.set_congestion_control(control)?;
            load(site, way, connections)
        })?;
        let what = format!(
            "unlimited {}, {control}, {connections} connections",
            way.name()
        );
        for arm in ARMS {
            let of = |other| ratios(&outcomes, arm, other, |bulk: &Bulk| bulk.gigabits);
            let gigabits: Vec<f64> = outcomes[&arm].iter().map(|o| o.gigabits).collect();
            let usages: Vec<&Usage> = outcomes[&arm].iter().map(|o| &o.usage).collect();
            let sum = |of: fn(&Usage) -> f64| usages.iter().map(|u| of(u)).sum::<f64>();
            let frames = typical(&usages, |u| u.frames);
            let lost = sum(|u| u.lost);
            let head = [control, way.name(), &connections.to_string(), arm.name()];
            let head = head.map(str::to_owned);
            let cells = [
                range(&gigabits, ""),
                range(&of(Arm::Bare), ""),
                range(&of(Arm::Async), ""),
                sum(|u| u.client_repeats as f64).to_string(),
                sum(|u| u.server_repeats as f64).to_string(),
                format!("{frames:.0}"),
                lost.to_string(),
            ];
            speeds.push([&head[..], &cells].concat());
            spent.push([&head[..], &costs(&usages)].concat());
            if matches!(arm, Arm::Sync | Arm::SyncLink) {
                figures.push(Figure::at_least(
                    format!("{what}, {}: of mirror, async", arm.name()),
                    median(&of(Arm::Async)),
                    TARGET,
                    |ratio| format!("{ratio:.2}"),
                ));
                figures.push(Figure::told(
                    format!(
                        "{what}, {}: of bare; frames/s read; copies lost",
                        arm.name()
                    ),
                    format!("{:.2}; {frames:.0}; {lost}", median(&of(Arm::Bare))),
                ));
            }
        }
    }
    println!(
        "{}\n{}\nVoid runs: {}\n",
        table(&speeds),
        table(&spent),
        turns.void
    );
    Ok(figures)
}

fn cases<'a>(controls: &'a [&'a str]) -> impl Iterator<Item = (&'a str, Way, usize)> {
    controls.iter().flat_map(|control| {
        let ways = Way::ALL.into_iter();
        ways.flat_map(move |way| CONNECTIONS.map(|connections| (*control, way, connections)))
    })
}
