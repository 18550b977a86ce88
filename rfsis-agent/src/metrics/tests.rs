use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rfsis_common::maps::State;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;

use super::*;

fn metrics() -> Arc<Metrics> {
    Arc::new(Metrics::new("1.2.3").unwrap())
}

fn no_hook() -> ScrapeHook {
    Arc::new(|_| {})
}

fn text_of(metrics: &Metrics) -> String {
    String::from_utf8(metrics.scrape(&no_hook()).unwrap()).unwrap()
}

#[test]
fn every_metric_has_the_name_and_type_of_the_contract() {
    let metrics = metrics();
    // Families whose label values come with the config or with an event.
    metrics.failovers.with_label_values(&["peer_silent"]).inc();
    metrics.connections("echo");
    metrics.accept_errors("echo");
    metrics.datagrams("echo");
    let text = text_of(&metrics);
    let types: BTreeMap<&str, &str> = text
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '))
        .collect();
    let expected = BTreeMap::from([
        ("rfsis_build_info", "gauge"),
        ("rfsis_state", "gauge"),
        ("rfsis_epoch", "gauge"),
        ("rfsis_failovers_total", "counter"),
        ("rfsis_redundant", "gauge"),
        ("rfsis_without_redundancy_seconds_total", "counter"),
        ("rfsis_takeover_duration_seconds", "histogram"),
        ("rfsis_carrier", "gauge"),
        ("rfsis_heartbeat_age_seconds", "gauge"),
        ("rfsis_heartbeats_total", "counter"),
        ("rfsis_sync_datagrams_total", "counter"),
        ("rfsis_pledges_broken_total", "counter"),
        ("rfsis_sync_records_skipped_total", "counter"),
        ("rfsis_flows", "gauge"),
        ("rfsis_flows_refused_total", "counter"),
        ("rfsis_guard_refused_total", "counter"),
        ("rfsis_guard_stuck_total", "counter"),
        ("rfsis_guarded_flows", "gauge"),
        ("rfsis_protection", "gauge"),
        ("rfsis_flow_resets_total", "counter"),
        ("rfsis_adoptions_total", "counter"),
        ("rfsis_adoption_duration_seconds", "histogram"),
        ("rfsis_shadow_lag_bytes", "gauge"),
        ("rfsis_shadow_bytes", "gauge"),
        ("rfsis_late_joins_total", "counter"),
        ("rfsis_late_join_duration_seconds", "histogram"),
        ("rfsis_late_joins_waiting", "gauge"),
        ("rfsis_frames_total", "counter"),
        ("rfsis_xdp_packets_total", "counter"),
        ("rfsis_ring_dropped_total", "counter"),
        ("rfsis_gate_packets_total", "counter"),
        ("rfsis_mirror_packets_total", "counter"),
        ("rfsis_ack_gate_packets_total", "counter"),
        ("rfsis_xdp_mode", "gauge"),
        ("rfsis_connections_total", "counter"),
        ("rfsis_accept_errors_total", "counter"),
        ("rfsis_datagrams_total", "counter"),
        ("rfsis_datagrams_replayed_total", "counter"),
        ("rfsis_held_released_total", "counter"),
        ("rfsis_held_doubted_total", "counter"),
        ("rfsis_shadow_send_failures_total", "counter"),
    ]);
    assert_eq!(types, expected);
    assert!(text.contains("rfsis_build_info{version=\"1.2.3\"} 1\n"));
}

#[test]
fn every_series_exists_before_anything_happened() {
    let text = text_of(&metrics());
    for series in [
        "rfsis_state{state=\"fenced\"} 0",
        "rfsis_heartbeats_total{direction=\"sent\",result=\"send_failed\"} 0",
        "rfsis_heartbeats_total{direction=\"received\",result=\"unproven\"} 0",
        "rfsis_sync_datagrams_total{direction=\"sent\",result=\"ok\"} 0",
        "rfsis_sync_datagrams_total{direction=\"received\",result=\"wrong_epoch\"} 0",
        "rfsis_flows{condition=\"lockstep\"} 0",
        "rfsis_flow_resets_total{reason=\"unpredictable\"} 0",
        "rfsis_frames_total{result=\"from_active\"} 0",
        "rfsis_xdp_packets_total{verdict=\"mirror_lost\"} 0",
        "rfsis_ack_gate_packets_total{verdict=\"opening_lost\"} 0",
        "rfsis_ring_dropped_total{ring=\"heartbeats\"} 0",
        "rfsis_gate_packets_total{verdict=\"held\"} 0",
        "rfsis_xdp_mode{mode=\"tc\"} 0",
    ] {
        assert!(text.lines().any(|line| line == series), "{series}\n{text}");
    }
}

#[test]
fn each_label_counts_for_itself_alone() {
    fn distinct<L: Label + std::fmt::Debug>() {
        for (index, value) in L::ALL.iter().enumerate() {
            assert_eq!(value.index(), index, "{value:?}");
        }
        let words: std::collections::HashSet<_> = L::ALL.iter().map(|l| l.as_str()).collect();
        assert_eq!(words.len(), L::ALL.len());
    }
    distinct::<HeartbeatSent>();
    distinct::<HeartbeatReceived>();
    distinct::<SyncSent>();
    distinct::<SyncReceived>();
    distinct::<FlowCondition>();
    distinct::<ResetReason>();
    distinct::<FrameResult>();
    distinct::<Ring>();
    distinct::<DatagramResult>();
    distinct::<ReplayResult>();
    distinct::<XdpMode>();
    distinct::<State>();
    distinct::<XdpVerdict>();
    distinct::<GateVerdict>();

    let metrics = metrics();
    metrics.heartbeats_received.inc(HeartbeatReceived::BadMac);
    metrics.xdp_packets.add(XdpVerdict::Heartbeat, 5);
    let text = text_of(&metrics);
    let nonzero: Vec<&str> = text
        .lines()
        .filter(|line| line.starts_with("rfsis_heartbeats") || line.starts_with("rfsis_xdp_p"))
        .filter(|line| !line.ends_with(" 0"))
        .collect();
    assert_eq!(
        nonzero,
        [
            "rfsis_heartbeats_total{direction=\"received\",result=\"bad_mac\"} 1",
            "rfsis_xdp_packets_total{verdict=\"heartbeat\"} 5",
        ]
    );
}

#[test]
fn the_state_is_one_of_all() {
    let metrics = metrics();
    for state in State::ALL {
        metrics.state.choose(state);
        for other in State::ALL {
            assert_eq!(metrics.state.get(other) == 1.0, other == state);
        }
    }
}

#[test]
fn a_counter_follows_the_kernels_and_never_goes_back() {
    let metrics = metrics();
    let counter = &metrics.gate_packets;
    for (total, shown) in [(3, 3), (10, 10), (10, 10), (2, 10), (11, 11)] {
        counter.raise_to(GateVerdict::Held, total);
        assert_eq!(counter.get(GateVerdict::Held), shown);
    }
}

#[test]
fn takeover_buckets_reach_from_50_us_to_1_s() {
    let metrics = metrics();
    metrics.takeover_duration.observe(0.00004);
    let text = text_of(&metrics);
    assert!(
        text.contains("rfsis_takeover_duration_seconds_bucket{le=\"0.00005\"} 1\n"),
        "{text}"
    );
    assert!(
        text.contains("rfsis_takeover_duration_seconds_bucket{le=\"1\"} 1\n"),
        "{text}"
    );
}

/// A running server on a port that the kernel chose.
struct Server {
    address: std::net::SocketAddr,
    ready: Arc<AtomicBool>,
    kernel: Arc<AtomicU64>,
    cancel: CancellationToken,
    task: tokio::task::JoinHandle<()>,
}

impl Server {
    async fn start() -> Server {
        let listener = bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let address = listener.local_addr().unwrap();
        let ready = Arc::new(AtomicBool::new(false));
        let kernel = Arc::new(AtomicU64::new(0));
        let cancel = CancellationToken::new();
        let (is_ready, total) = (Arc::clone(&ready), Arc::clone(&kernel));
        let hook: ScrapeHook = Arc::new(move |metrics| {
            let total = total.load(Ordering::SeqCst);
            metrics.xdp_packets.raise_to(XdpVerdict::Mirrored, total);
        });
        let readiness: Readiness = Arc::new(move || {
            if is_ready.load(Ordering::SeqCst) {
                Ok(())
            } else {
                Err("peer not heard".into())
            }
        });
        let task = tokio::spawn(serve(listener, metrics(), hook, readiness, cancel.clone()));
        Server {
            address,
            ready,
            kernel,
            cancel,
            task,
        }
    }

    async fn get(&self, path: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        // Read to the end: one request a connection, the server closes.
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head[9..12].parse().unwrap(), body.to_owned())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn live_ready_and_metrics_answer_for_what_they_name() {
    let server = Server::start().await;
    assert_eq!(server.get("/live").await, (200, "live\n".into()));
    assert_eq!(server.get("/ready").await, (503, "peer not heard\n".into()));
    server.ready.store(true, Ordering::SeqCst);
    assert_eq!(server.get("/ready").await, (200, "ready\n".into()));
    assert_eq!(server.get("/secret").await.0, 404);
    for total in [7, 9] {
        server.kernel.store(total, Ordering::SeqCst);
        let (code, text) = server.get("/metrics").await;
        assert_eq!(code, 200);
        let series = format!("rfsis_xdp_packets_total{{verdict=\"mirrored\"}} {total}\n");
        assert!(text.contains(&series), "{text}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn silent_clients_are_cut_and_give_way_to_others() {
    let server = Server::start().await;
    let mut silent = Vec::new();
    for _ in 0..64 {
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        stream.write_all(b"GET /live HTTP/1.1\r\n").await.unwrap();
        silent.push(stream);
    }
    let asked = Instant::now();
    assert_eq!(server.get("/live").await.0, 200);
    let waited = asked.elapsed();
    assert!(
        waited > Duration::from_secs(3),
        "more than 64 at a time: {waited:?}"
    );
    assert!(waited < Duration::from_secs(9), "{waited:?}");
    // Closed, one way or the other.
    let mut rest = Vec::new();
    let _ = silent[0].read_to_end(&mut rest).await;
    assert!(!rest.starts_with(b"HTTP/1.1 200"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_can_be_written_and_no_head_is_too_large_to_refuse() {
    let server = Server::start().await;
    let code = async |request: &[u8]| {
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        // It may be refused before all is sent.
        let _ = stream.write_all(request).await;
        let mut answer = [0; 12];
        stream.read_exact(&mut answer).await.unwrap();
        String::from_utf8_lossy(&answer).into_owned()
    };
    for path in ["/metrics", "/live", "/ready"] {
        for method in ["POST", "PUT", "PATCH", "DELETE", "OPTIONS"] {
            let request =
                format!("{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n");
            let answer = code(request.as_bytes()).await;
            assert_eq!(answer, "HTTP/1.1 405", "{method} {path}");
        }
    }
    let large = ["GET /live HTTP/1.1\r\nHost: ", &"x".repeat(9000)].concat();
    assert_eq!(code(large.as_bytes()).await, "HTTP/1.1 431");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancelled_server_frees_its_port() {
    let server = Server::start().await;
    assert_eq!(server.get("/live").await.0, 200);
    server.cancel.cancel();
    server.task.await.unwrap();
    assert!(TcpStream::connect(server.address).await.is_err());
}

#[tokio::test]
async fn a_taken_address_is_named() {
    let taken = bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let address = taken.local_addr().unwrap();
    let error = bind(address).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "metrics.listen {address}: Address already in use (os error 98); \
             free the address or change `metrics: {{ listen }}`"
        )
    );
}
