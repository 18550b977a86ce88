//! Bulk data over a client's link of a known rate: what is left of it with RFSIS.

use std::collections::BTreeMap;

use anyhow::Result;
use tests::Host;
use tests::report::{Figure, median, range, row, table};

use crate::bulk::{Bulk, Way, load};
use crate::meter::Usage;
use crate::site::{Arm, Turns, ratios};

const ARMS: [Arm; 3] = [Arm::Bare, Arm::Sync, Arm::SyncLink];
const RATES: [&str; 2] = ["1gbit", "5gbit"];
const CONNECTIONS: [usize; 2] = [1, 8];
/// Above this a median says no more.
const ROUNDS_MOST: usize = 7;
/// What should be left.
const TARGET: f64 = 0.97;

pub fn measure(runs: usize) -> Result<Vec<Figure>> {
    let rounds = runs.min(ROUNDS_MOST);
    println!(
        "### Bulk TCP with the client's cable limited (TBF, both ways), offloads on, endpoints pinned: median \
         (least–greatest) of {rounds} paired rounds\n"
    );
    let mut rows = vec![row([
        "rate",
        "way",
        "connections",
        "bare, Gbit/s",
        "mirror, sync",
        "ratio",
        "over a sync link",
        "ratio",
        "client's retransmissions: bare, sync, sync link",
        "server's",
        "copies lost",
    ])];
    let (mut figures, mut turns) = (Vec::new(), Turns::new(&ARMS));
    for rate in RATES {
        for way in Way::ALL {
            for connections in CONNECTIONS {
                let outcomes = turns.measure(rounds, |site| {
                    site.lab.limit(Host::Client, rate)?;
                    load(site, way, connections)
                })?;
                let speed = |arm| {
                    let speeds: Vec<f64> = outcomes[&arm].iter().map(|o| o.gigabits).collect();
                    format!("{:.2}", median(&speeds))
                };
                let ratio = |arm| ratios(&outcomes, arm, Arm::Bare, |bulk| bulk.gigabits);
                let (mirror, link) = (ratio(Arm::Sync), ratio(Arm::SyncLink));
                rows.push(vec![
                    rate.to_owned(),
                    way.name().to_owned(),
                    connections.to_string(),
                    speed(Arm::Bare),
                    speed(Arm::Sync),
                    range(&mirror, ""),
                    speed(Arm::SyncLink),
                    range(&link, ""),
                    totals(&outcomes, |usage| usage.client_repeats as f64),
                    totals(&outcomes, |usage| usage.server_repeats as f64),
                    totals(&outcomes, |usage| usage.lost),
                ]);
                let what = format!("{rate} {}, {connections} connections: of bare", way.name());
                for (over, ratios) in [("", mirror), (", over a sync link", link)] {
                    figures.push(Figure::at_least(
                        format!("{what}{over}"),
                        median(&ratios),
                        TARGET,
                        |ratio| format!("{ratio:.2}"),
                    ));
                }
            }
        }
    }
    println!("{}\nVoid runs: {}\n", table(&rows), turns.void);
    Ok(figures)
}

/// Sums over all rounds, arm by arm.
fn totals(outcomes: &BTreeMap<Arm, Vec<Bulk>>, of: fn(&Usage) -> f64) -> String {
    let sums = ARMS.map(|arm| {
        let sum: f64 = outcomes[&arm].iter().map(|bulk| of(&bulk.usage)).sum();
        sum.to_string()
    });
    sums.join(", ")
}
