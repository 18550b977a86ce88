//! UDP across a takeover: what the dead active left unanswered is answered by its successor.

#![expect(clippy::unwrap_used, reason = "a step that fails fails the test")]

use std::io::ErrorKind;
use std::net::{Ipv4Addr, UdpSocket};
use std::time::{Duration, Instant};

use tests::agent::port;
use tests::patience::{PATIENCE, slowed, wait_until};
use tests::{Death, Lab, Pair, Settings, Tap, VIP, Wiring, on_each_wiring};

const REPLAYED: &str = "rfsis_datagrams_replayed_total";
const ANSWERED: [(&str, &str); 1] = [("result", "answered")];
const SEEN: [(&str, &str); 1] = [("result", "datagram")];

/// A client of one UDP service. Takes datagrams from the VIP's port alone.
struct Client(UdpSocket);

impl Client {
    fn of(lab: &Lab, port: u16) -> Self {
        let socket = lab.client().run(|| {
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
            socket.connect((VIP, port))?;
            Ok::<_, std::io::Error>(socket)
        });
        Self(socket.unwrap())
    }

    fn says(&self, text: &str) {
        self.0.send(text.as_bytes()).unwrap();
    }

    /// The next datagram within `limit`.
    fn hears_within(&self, limit: Duration) -> Option<String> {
        let mut buffer = [0; 2048];
        self.0.set_read_timeout(Some(slowed(limit))).unwrap();
        match self.0.recv(&mut buffer) {
            Ok(len) => Some(String::from_utf8_lossy(&buffer[..len]).into_owned()),
            Err(error) if error.kind() == ErrorKind::WouldBlock => None,
            Err(error) => panic!("the client was refused: {error}"),
        }
    }

    #[track_caller]
    fn hears(&self) -> String {
        self.hears_within(PATIENCE).expect("a datagram")
    }

    #[track_caller]
    fn hears_nothing_more(&self) {
        assert_eq!(self.hears_within(Duration::from_millis(300)), None);
    }
}

/// Kills or stops the primary and waits until it is no more able to answer, which takes a moment. A
/// stopped process has stopped when each of its threads has.
fn dies_for_certain(pair: &mut Pair, lab: &Lab, death: Death) {
    pair.primary_dies(lab, death);
    match death {
        Death::Kill9 => drop(pair.primary.await_exit()),
        Death::LinkCut => {}
        Death::Stop => {
            let tasks = format!("/proc/{}/task", pair.primary.pid());
            let states = || -> Vec<String> {
                let threads = std::fs::read_dir(&tasks).unwrap();
                let stat = |thread: std::fs::DirEntry| {
                    std::fs::read_to_string(thread.path().join("stat")).unwrap()
                };
                threads.map(|thread| stat(thread.unwrap())).collect()
            };
            // proc(5): the state follows the name in parentheses.
            wait_until("all threads to stop", states, |stats| {
                stats.iter().all(|stat| stat.contains(") T "))
            });
        }
    }
}

/// A takeover after 600 ms: time enough to say something to a dead active before its lease ends, up to which
/// its kernel copies what comes in.
fn settings(wiring: Wiring) -> Settings {
    Settings {
        missed: 12,
        udp_replay: Some("10s".into()),
        ..wiring.settings()
    }
}

fn unanswered_is_answered_by_the_successor(wiring: Wiring, death: Death) {
    let lab = wiring.lab();
    let mut pair = Pair::start(&lab, &settings(wiring));
    let client = Client::of(&lab, port::ECHO);
    client.says("answered by the active");
    assert_eq!(client.hears(), "answered by the active");
    dies_for_certain(&mut pair, &lab, death);
    for text in ["first", "second"] {
        client.says(text);
    }
    assert_eq!(client.hears(), "first");
    assert_eq!(client.hears(), "second");
    pair.wait_takeover();
    client.hears_nothing_more();
    assert_eq!(pair.backup.metrics().sum(REPLAYED, &ANSWERED), 2.0);
    client.says("to the successor");
    assert_eq!(client.hears(), "to the successor");
}

/// Each datagram of a stream is answered once, whoever of the two did it.
fn a_stream_across_the_death(wiring: Wiring, death: Death) {
    const COUNT: u32 = 120;
    let lab = wiring.lab();
    let pair = Pair::start(&lab, &settings(wiring));
    let client = Client::of(&lab, port::ECHO);
    let start = Instant::now();
    for number in 0..COUNT {
        client.says(&number.to_string());
        if number == COUNT / 2 {
            pair.primary_dies(&lab, death);
        }
        let next = Duration::from_millis(1) * (number + 1);
        std::thread::sleep(next.saturating_sub(start.elapsed()));
    }
    let mut heard: Vec<u32> = (0..COUNT)
        .map(|_| client.hears().parse().unwrap())
        .collect();
    // What the successor's kernel gets while the older ones are being answered may overtake them.
    heard.sort_unstable();
    assert_eq!(heard, Vec::from_iter(0..COUNT));
    pair.wait_takeover();
    client.hears_nothing_more();
    let by_the_successor = pair.backup.metrics().sum(REPLAYED, &ANSWERED);
    assert!(by_the_successor > 0.0, "the active answered all");
    // Those that the active had not come to before its death are among them.
    assert!(
        by_the_successor < f64::from(COUNT),
        "the active answered none"
    );
}

/// Asks three services, lets the primary die when the standby has seen all answers, and hears nothing.
fn answered_is_not_answered_again(lab: &Lab, pair: &mut Pair) {
    let services = [port::ECHO, port::CHARGEN, port::DAYTIME];
    let clients = services.map(|port| Client::of(lab, port));
    for round in 1..=5_u32 {
        for client in &clients {
            client.says("asked");
            client.hears();
        }
        let both_ways = f64::from(2 * round * services.len() as u32);
        let metric = "rfsis_frames_total";
        pair.backup.wait_metric(metric, &SEEN, both_ways);
    }
    dies_for_certain(pair, lab, Death::Kill9);
    pair.wait_takeover();
    clients[0].says("to the successor");
    assert_eq!(clients[0].hears(), "to the successor");
    for client in &clients {
        client.hears_nothing_more();
    }
    let replayed = pair.backup.metrics().sum(REPLAYED, &[]);
    assert_eq!(replayed, 0.0);
}

on_each_wiring! { [lan: Lan, mirror: Mirror, mirror_over_a_sync_link: MirrorOverSyncLink] {
    a_datagram_to_a_killed_active_is_answered_once_by_its_successor =>
        |wiring| unanswered_is_answered_by_the_successor(wiring, Death::Kill9);
    a_datagram_to_a_stopped_active_is_answered_once_by_its_successor =>
        |wiring| unanswered_is_answered_by_the_successor(wiring, Death::Stop);
    a_stream_of_datagrams_across_a_kill_is_answered_each_once =>
        |wiring| a_stream_across_the_death(wiring, Death::Kill9);
    a_stream_of_datagrams_across_a_stop_is_answered_each_once =>
        |wiring| a_stream_across_the_death(wiring, Death::Stop);
    what_the_active_answered_is_not_answered_again => |wiring| {
        let lab = wiring.lab();
        let mut pair = Pair::start(&lab, &settings(wiring));
        answered_is_not_answered_again(&lab, &mut pair);
    };
}}

#[test]
fn a_datagram_that_nobody_but_the_hub_carried_is_answered_too() {
    unanswered_is_answered_by_the_successor(Wiring::Lan, Death::LinkCut);
}

#[test]
fn a_standby_that_is_shown_handshakes_only_knows_what_was_answered() {
    let wiring = Wiring::Mirror;
    let lab = wiring.lab();
    let config = lab.directory().join("handshake.yaml");
    let settings = settings(wiring);
    assert_eq!(settings.tap, Tap::Mirror);
    let yaml = settings.yaml() + "mirror_egress: handshake\n";
    std::fs::write(&config, yaml).unwrap();
    let mut pair = Pair::start_with(&lab, &config).unwrap();
    answered_is_not_answered_again(&lab, &mut pair);
}

#[test]
fn with_udp_replay_off_what_was_left_unanswered_stays_so() {
    for wiring in [Wiring::Lan, Wiring::Mirror] {
        let lab = wiring.lab();
        let off = Settings {
            udp_replay: Some("0".into()),
            ..settings(wiring)
        };
        let mut pair = Pair::start(&lab, &off);
        let client = Client::of(&lab, port::ECHO);
        client.says("answered by the active");
        assert_eq!(client.hears(), "answered by the active");
        dies_for_certain(&mut pair, &lab, Death::Kill9);
        client.says("unanswered");
        pair.wait_takeover();
        client.says("to the successor");
        assert_eq!(client.hears(), "to the successor");
        client.hears_nothing_more();
    }
}
