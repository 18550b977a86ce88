//! Real sockets on loopback. There is no gate here, so what the gate would hold is visible.

mod adopted;

use std::os::fd::AsFd;
use std::sync::Mutex;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::*;
use crate::metrics::DatagramResult;
use crate::sync::Snapshot;

const VIP: Ipv4Addr = Ipv4Addr::LOCALHOST;
/// Nothing on loopback takes this long unless it hangs.
const PATIENCE: Duration = Duration::from_secs(30);

/// Remembers what it was asked.
struct Recorder {
    approved: Mutex<Vec<FlowKey>>,
    revoked: Mutex<Vec<FlowKey>>,
    approvals: mpsc::UnboundedSender<FlowKey>,
}

impl FlowGate for Recorder {
    fn approve(&self, flow: FlowKey) -> io::Result<()> {
        self.approved.lock().unwrap().push(flow);
        self.approvals.send(flow).map_err(io::Error::other)
    }

    fn revoke(&self, flow: FlowKey) -> io::Result<()> {
        self.revoked.lock().unwrap().push(flow);
        Ok(())
    }
}

/// One service on a port that the kernel chose.
struct Lab {
    address: SocketAddr,
    state: watch::Sender<State>,
    gate: Arc<Recorder>,
    approvals: mpsc::UnboundedReceiver<FlowKey>,
    connections: Arc<Connections>,
    snapshots: Snapshots,
    metrics: Arc<Metrics>,
    cancel: CancellationToken,
    adopted: mpsc::Sender<Vec<Adopted>>,
    running: JoinHandle<()>,
}

impl Lab {
    fn start(protocol: Protocol, handler: HandlerKind, state: State) -> Lab {
        let service = Service {
            name: "it".into(),
            protocol,
            port: 0,
            handler,
        };
        let services = Services::bind(VIP, &[service]).unwrap();
        let address = services.addresses().unwrap()[0];
        let (sender, approvals) = mpsc::unbounded_channel();
        let gate = Arc::new(Recorder {
            approved: Mutex::default(),
            revoked: Mutex::default(),
            approvals: sender,
        });
        let (connections, snapshots) = Connections::new().unwrap();
        let (state, watcher) = watch::channel(state);
        let metrics = Arc::new(Metrics::new("0").unwrap());
        let cancel = CancellationToken::new();
        let (adopted, to_adopt) = mpsc::channel(1);
        let running = tokio::spawn(services.run(
            watcher,
            to_adopt,
            Arc::clone(&gate) as Arc<dyn FlowGate>,
            Arc::clone(&connections),
            Arc::clone(&metrics),
            cancel.clone(),
        ));
        Lab {
            address,
            state,
            gate,
            approvals,
            connections,
            snapshots,
            metrics,
            cancel,
            adopted,
            running,
        }
    }

    fn active(handler: HandlerKind) -> Lab {
        Lab::start(Protocol::Tcp, handler, State::Active)
    }

    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }

    fn flow(&self, client: &TcpStream) -> FlowKey {
        FlowKey {
            client_addr: u32::from(VIP),
            client_port: client.local_addr().unwrap().port(),
            service_port: self.address.port(),
        }
    }

    fn approved(&self) -> Vec<FlowKey> {
        self.gate.approved.lock().unwrap().clone()
    }

    /// The next approval, and that there was no other before.
    async fn next_approval(&mut self) -> FlowKey {
        timeout(PATIENCE, self.approvals.recv())
            .await
            .expect("no approval")
            .unwrap()
    }

    /// Stops, and waits until every socket is closed.
    async fn stop(self) -> Vec<FlowKey> {
        self.cancel.cancel();
        timeout(PATIENCE, self.running)
            .await
            .expect("a task hangs")
            .unwrap();
        self.gate.approved.lock().unwrap().clone()
    }
}

async fn read_all(client: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    timeout(PATIENCE, client.read_to_end(&mut bytes))
        .await
        .expect("the server neither sends nor closes")?;
    Ok(bytes)
}

async fn read_some(client: &mut TcpStream, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    timeout(PATIENCE, client.read_exact(&mut bytes))
        .await
        .expect("the server does not send")
        .unwrap();
    bytes
}

/// The connection ends by RST, whatever came before it.
async fn assert_reset(client: &mut TcpStream) {
    let error = read_all(client).await.expect_err("a FIN, expected an RST");
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
}

/// The server's socket is gone, though it had closed its side in peace before: writing fails. (Reading
/// cannot tell, it stays at the end of the stream.)
async fn assert_cut(client: &mut TcpStream) {
    let error = loop {
        if let Err(error) = client.write_all(b"x").await {
            break error;
        }
        tokio::task::yield_now().await;
    };
    assert!(matches!(
        error.kind(),
        io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe
    ));
}

/// Bytes of no period that a lost or swapped block could hide in.
fn noise(count: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(count + 8);
    while bytes.len() < count {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(count);
    bytes
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn echo_returns_16_mib_byte_for_byte_and_closes_after_the_client() {
    let lab = Lab::active(HandlerKind::Echo);
    let client = lab.connect().await;
    let flow = lab.flow(&client);
    let (mut reader, mut writer) = client.into_split();
    let sent = noise(16 << 20);
    let copy = sent.clone();
    let sender = tokio::spawn(async move {
        writer.write_all(&copy).await.unwrap();
        writer.shutdown().await.unwrap();
        writer
    });
    let mut echoed = Vec::new();
    timeout(PATIENCE, reader.read_to_end(&mut echoed))
        .await
        .expect("echo stalls")
        .unwrap();
    assert!(
        echoed == sent,
        "{} of {} bytes came back right",
        echoed.len(),
        sent.len()
    );
    // The approval must stand before the FIN that ended the reading could leave.
    assert_eq!(lab.approved(), [flow]);
    drop(sender.await.unwrap());
    assert_eq!(lab.stop().await, [flow]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn echo_answers_while_the_client_goes_on_talking() {
    let lab = Lab::active(HandlerKind::Echo);
    let mut client = lab.connect().await;
    for line in [&b"one\n"[..], b"two\n", b"three\n"] {
        client.write_all(line).await.unwrap();
        assert_eq!(read_some(&mut client, line.len()).await, line);
    }
    assert_eq!(lab.approved(), []);
    assert_eq!(*lab.gate.revoked.lock().unwrap(), [lab.flow(&client)]);
    assert_eq!(lab.metrics.connections("it").get(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_does_not_read_is_stopped_and_loses_nothing() {
    let lab = Lab::active(HandlerKind::Echo);
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    // Fixed, or the client's own kernel would take megabytes before it pushes back.
    socket.set_recv_buffer_size(64 << 10).unwrap();
    socket.set_send_buffer_size(64 << 10).unwrap();
    let client = socket.connect(lab.address).await.unwrap();
    let (mut reader, mut writer) = client.into_split();
    let bytes = noise(4 << 20);
    let mut absorbed = 0;
    // Half a second without room means stopped, not slow.
    while let Ok(written) =
        timeout(Duration::from_millis(500), writer.write(&bytes[absorbed..])).await
    {
        absorbed += written.unwrap();
        assert!(absorbed < 2 << 20, "the server takes without bound");
    }
    let rest = bytes[absorbed..].to_vec();
    let sender = tokio::spawn(async move {
        writer.write_all(&rest).await.unwrap();
        writer.shutdown().await.unwrap();
        writer
    });
    let mut echoed = Vec::new();
    timeout(PATIENCE, reader.read_to_end(&mut echoed))
        .await
        .expect("echo stalls")
        .unwrap();
    assert!(echoed == bytes, "{} bytes came back", echoed.len());
    drop(sender.await.unwrap());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn discard_swallows_all_and_closes_after_the_client() {
    let lab = Lab::active(HandlerKind::Discard);
    let mut client = lab.connect().await;
    client.write_all(&noise(1 << 20)).await.unwrap();
    assert_eq!(lab.approved(), []);
    client.shutdown().await.unwrap();
    assert_eq!(read_all(&mut client).await.unwrap(), b"");
    assert_eq!(lab.approved(), [lab.flow(&client)]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn chargen_goes_on_after_the_clients_half_close_until_it_leaves() {
    let mut lab = Lab::active(HandlerKind::Chargen);
    let mut client = lab.connect().await;
    client.write_all(b"ignored").await.unwrap();
    let mut expected = vec![0; 3 << 20];
    crate::handler::chargen_fill(0, &mut expected);
    assert!(read_some(&mut client, 1 << 20).await == expected[..1 << 20]);
    client.shutdown().await.unwrap();
    assert!(read_some(&mut client, 2 << 20).await == expected[1 << 20..]);
    assert_eq!(lab.approved(), []);
    let flow = lab.flow(&client);
    drop(client);
    assert_eq!(lab.next_approval().await, flow);
    assert_eq!(lab.stop().await, [flow]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn daytime_closes_first_and_outlives_what_the_client_still_says() {
    let lab = Lab::active(HandlerKind::Daytime);
    let mut client = lab.connect().await;
    let text = String::from_utf8(read_all(&mut client).await.unwrap()).unwrap();
    let time = text.strip_suffix("\r\n").unwrap();
    let said = humantime::parse_rfc3339(time).unwrap();
    assert!(said.elapsed().unwrap() < Duration::from_secs(60));
    assert_eq!(lab.approved(), [lab.flow(&client)]);
    // Half-closed, not closed: a closed socket would answer the first of these by an RST.
    for _ in 0..3 {
        client.write_all(&noise(1000)).await.unwrap();
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(client.take_error().unwrap().map(|error| error.kind()), None);
}

#[tokio::test(start_paused = true)]
async fn a_client_that_never_closes_is_cut_after_a_minute_of_silence() {
    let lab = Lab::active(HandlerKind::Daytime);
    let mut client = lab.connect().await;
    let mut text = Vec::new();
    // Without a timeout: the clock is paused and jumps to the next timer whenever all wait.
    client.read_to_end(&mut text).await.unwrap();
    client.write_all(b"still here").await.unwrap();
    tokio::time::sleep(Duration::from_secs(59)).await;
    assert_eq!(client.take_error().unwrap().map(|error| error.kind()), None);
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_cut(&mut client).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_resets_is_approved_and_forgotten() {
    let mut lab = Lab::active(HandlerKind::Echo);
    let mut client = lab.connect().await;
    client.write_all(b"x").await.unwrap();
    read_some(&mut client, 1).await;
    let flow = lab.flow(&client);
    client.set_zero_linger().unwrap();
    drop(client);
    assert_eq!(lab.next_approval().await, flow);
    assert_eq!(lab.stop().await, [flow]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_in_every_state_are_aborted_unapproved_when_the_node_stops_being_active() {
    for next in [State::Standby, State::Fenced, State::TakingOver] {
        // Idle.
        let echo = Lab::active(HandlerKind::Echo);
        let mut idle = echo.connect().await;
        idle.write_all(b"x").await.unwrap();
        read_some(&mut idle, 1).await;
        echo.state.send(next).unwrap();
        assert_reset(&mut idle).await;
        assert_eq!(echo.stop().await, []);

        // Blocked in writing, because the client does not read.
        let chargen = Lab::active(HandlerKind::Chargen);
        let mut blocked = chargen.connect().await;
        read_some(&mut blocked, 1).await;
        chargen.state.send(next).unwrap();
        assert_reset(&mut blocked).await;
        assert_eq!(chargen.stop().await, []);

        // Half-closed by the server: approved for that, and for nothing more.
        let mut daytime = Lab::active(HandlerKind::Daytime);
        let mut half = daytime.connect().await;
        read_all(&mut half).await.unwrap();
        let flow = daytime.next_approval().await;
        daytime.state.send(next).unwrap();
        timeout(PATIENCE, assert_cut(&mut half))
            .await
            .expect("the server still takes bytes");
        assert_eq!(daytime.stop().await, [flow]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_quick_way_out_of_active_and_back_is_not_overlooked() {
    let lab = Lab::active(HandlerKind::Echo);
    let mut client = lab.connect().await;
    client.write_all(b"x").await.unwrap();
    read_some(&mut client, 1).await;
    lab.state.send(State::Standby).unwrap();
    lab.state.send(State::Active).unwrap();
    assert_reset(&mut client).await;
    let mut client = lab.connect().await;
    client.write_all(b"y").await.unwrap();
    assert_eq!(read_some(&mut client, 1).await, b"y");
    assert_eq!(lab.stop().await, []);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_to_a_node_that_is_not_active_is_aborted() {
    for state in [State::Standby, State::TakingOver, State::Fenced] {
        let lab = Lab::start(Protocol::Tcp, HandlerKind::Chargen, state);
        // The RST may come before the client's kernel has told it of the handshake.
        match TcpStream::connect(lab.address).await {
            Ok(mut client) => assert_reset(&mut client).await,
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::ConnectionReset),
        }
        while lab.metrics.connections("it").get() == 0 {
            tokio::task::yield_now().await;
        }
        assert_eq!(lab.stop().await, []);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stopping_aborts_without_approval() {
    let lab = Lab::active(HandlerKind::Echo);
    let mut client = lab.connect().await;
    client.write_all(b"x").await.unwrap();
    read_some(&mut client, 1).await;
    assert_eq!(lab.stop().await, []);
    assert_reset(&mut client).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sockets_hold_no_more_than_a_shadow_can_take() {
    let services = Services::bind(
        VIP,
        &[Service {
            name: "it".into(),
            protocol: Protocol::Tcp,
            port: 0,
            handler: HandlerKind::Echo,
        }],
    )
    .unwrap();
    let (_, listener) = &services.streams[0];
    let client = TcpStream::connect(listener.local_addr().unwrap())
        .await
        .unwrap();
    let (accepted, _) = listener.accept().await.unwrap();
    let accepted = socket2::SockRef::from(&accepted);
    // Twice the number asked for, socket(7).
    assert_eq!(accepted.recv_buffer_size().unwrap(), 2 * RECEIVE_BUFFER);
    assert_eq!(accepted.send_buffer_size().unwrap(), 2 * SEND_BUFFER);
    drop(client);
}

/// A client on another address than the VIP, which would count as a loop.
async fn udp_client(address: &str, to: SocketAddr) -> UdpSocket {
    loop {
        let client = UdpSocket::bind(address).await.unwrap();
        // On another address the system may give the service's own port, which counts as a loop too.
        if client.local_addr().unwrap().port() != to.port() {
            client.connect(to).await.unwrap();
            return client;
        }
    }
}

async fn udp_answer(client: &UdpSocket) -> Vec<u8> {
    let mut answer = vec![0; 70_000];
    let count = timeout(PATIENCE, client.recv(&mut answer))
        .await
        .expect("no answer")
        .unwrap();
    answer.truncate(count);
    answer
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn udp_echo_answers_from_the_vip_up_to_the_largest_datagram() {
    let lab = Lab::start(Protocol::Udp, HandlerKind::Echo, State::Active);
    let client = udp_client("127.0.0.2:0", lab.address).await;
    for size in [0, 1, 1472, 65_507] {
        let sent = noise(size);
        client.send(&sent).await.unwrap();
        // The client is connected: an answer from another address would not come through.
        assert!(udp_answer(&client).await == sent, "{size} bytes");
    }
    assert_eq!(lab.metrics.datagrams("it").get(DatagramResult::Answered), 4);
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn udp_daytime_and_chargen_answer_in_one_datagram() {
    for (handler, ends) in [
        (HandlerKind::Daytime, &b"Z\r\n"[..]),
        (HandlerKind::Chargen, &b"fg\r\n"[..]),
    ] {
        let lab = Lab::start(Protocol::Udp, handler, State::Active);
        let client = udp_client("127.0.0.2:0", lab.address).await;
        client.send(b"?").await.unwrap();
        let answer = udp_answer(&client).await;
        assert!(answer.ends_with(ends), "{answer:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn udp_ignores_loops_and_says_nothing_while_not_active() {
    let lab = Lab::start(Protocol::Udp, HandlerKind::Echo, State::Active);
    let from_the_vip = udp_client("127.0.0.1:0", lab.address).await;
    let client = udp_client("127.0.0.2:0", lab.address).await;
    from_the_vip.send(b"loop").await.unwrap();
    // One socket, one queue: once this is answered the one before has been judged.
    client.send(b"echo").await.unwrap();
    assert_eq!(udp_answer(&client).await, b"echo");
    let counters = lab.metrics.datagrams("it");
    assert_eq!(counters.get(DatagramResult::Loop), 1);
    assert_eq!(counters.get(DatagramResult::Answered), 1);

    lab.state.send(State::Standby).unwrap();
    client.send(b"unheard").await.unwrap();
    while counters.get(DatagramResult::Ignored) == 0 {
        tokio::task::yield_now().await;
    }
    let mut nothing = [0; 8];
    for silent in [&from_the_vip, &client] {
        let error = silent.try_recv(&mut nothing).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    }
    lab.stop().await;
}

#[tokio::test]
async fn a_bind_error_names_service_address_and_remedy() {
    let taken = std::net::TcpListener::bind((VIP, 0)).unwrap();
    let port = taken.local_addr().unwrap().port();
    let service = |port| Service {
        name: "echo".into(),
        protocol: Protocol::Tcp,
        port,
        handler: HandlerKind::Echo,
    };
    let error = Services::bind(VIP, &[service(port)]).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "service echo: cannot listen on tcp/127.0.0.1:{port}: Address already in use (os error 98); \
             stop what listens there: ss -Hlnpt 'sport = :{port}'"
        )
    );
    assert_eq!(Fatal::from(error).exit_code(), 1);

    let elsewhere = Ipv4Addr::new(192, 0, 2, 1);
    let error = Services::bind(elsewhere, &[service(port)]).unwrap_err();
    assert!(
        error
            .to_string()
            .ends_with("the virtual IP 192.0.2.1 must be configured on an interface of this host")
    );

    let denied = ServiceError {
        error: io::ErrorKind::PermissionDenied.into(),
        ..error
    };
    assert_eq!(Fatal::from(denied).exit_code(), 3);
}

impl Lab {
    /// The snapshot of a connection, or none.
    async fn snapshot(&self, flow: FlowKey) -> Option<Snapshot> {
        self.connections.ask(flow, 7);
        loop {
            let woken = self.snapshots.fd().try_clone_to_owned().unwrap();
            let woken = tokio::task::spawn_blocking(move || {
                let mut fds = [PollFd::new(woken.as_fd(), PollFlags::POLLIN)];
                poll(&mut fds, PollTimeout::try_from(PATIENCE).unwrap()).unwrap()
            });
            assert_eq!(woken.await.unwrap(), 1, "nobody answers");
            self.snapshots.calm();
            if let Some(taken) = self.snapshots.take() {
                assert_eq!((taken.flow, taken.join), (flow, 7));
                return taken.snapshot;
            }
        }
    }
}

#[tokio::test]
async fn a_snapshot_of_an_idle_connection_has_its_numbers_and_nothing_else() {
    let lab = Lab::active(HandlerKind::Echo);
    let mut client = lab.connect().await;
    let flow = lab.flow(&client);
    client.write_all(b"twelve bytes").await.unwrap();
    assert_eq!(read_some(&mut client, 12).await, b"twelve bytes");
    let first = lab.snapshot(flow).await.unwrap();
    assert!(first.input.is_empty() && first.output.is_empty() && !first.fin);
    assert_eq!(first.next, first.ack);
    assert_eq!(first.handler, HandlerKind::Echo.stream().snapshot());
    assert_eq!(Snapshot::parse(&first.to_bytes()).unwrap(), first);
    client.write_all(b"three").await.unwrap();
    read_some(&mut client, 5).await;
    let second = lab.snapshot(flow).await.unwrap();
    assert_eq!(second.next.wrapping_sub(first.next), 5);
    let written = second
        .unacknowledged
        .wrapping_add(second.output.len() as u32);
    assert_eq!(written.wrapping_sub(first.unacknowledged), 5);
    drop(client);
    lab.stop().await;
}

#[tokio::test]
async fn a_snapshot_of_a_blocked_connection_has_every_byte_on_either_way() {
    let mut lab = Lab::active(HandlerKind::Echo);
    let client = lab.connect().await;
    let flow = lab.flow(&client);
    // Until it is accepted there is nobody to ask.
    let before = loop {
        if let Some(snapshot) = lab.snapshot(flow).await {
            break snapshot;
        }
    };
    // It reads nothing: all buffers fill up.
    let stream: Vec<u8> = (0..16 << 20).map(|at: u32| (at ^ at >> 8) as u8).collect();
    let mut sent = 0;
    let full = Duration::from_millis(300);
    while let Ok(ready) = timeout(full, client.writable()).await {
        ready.unwrap();
        if let Ok(count) = client.try_write(&stream[sent..]) {
            sent += count;
        }
    }
    assert!(sent < stream.len());
    let snapshot = lab.snapshot(flow).await.unwrap();
    let taken = snapshot.next.wrapping_sub(before.next) as usize;
    let unread = snapshot.input.len();
    assert!(unread > BUFFER && snapshot.output.len() > BUFFER);
    assert_eq!(snapshot.input, stream[taken..taken + unread]);
    // What echo has taken it has written.
    let acknowledged = taken - snapshot.output.len();
    assert_eq!(snapshot.output, stream[acknowledged..taken]);
    let gone = snapshot.unacknowledged.wrapping_sub(before.unacknowledged);
    assert_eq!(gone as usize, acknowledged);
    // And it goes on.
    let (mut reading, mut writing) = client.into_split();
    let rest = stream.clone();
    let writer = tokio::spawn(async move {
        writing.write_all(&rest[sent..]).await.unwrap();
        writing.shutdown().await.unwrap();
    });
    let mut echoed = Vec::new();
    timeout(PATIENCE, reading.read_to_end(&mut echoed))
        .await
        .unwrap()
        .unwrap();
    assert!(echoed == stream);
    writer.await.unwrap();
    lab.next_approval().await;
    lab.stop().await;
}

/// What the handler's own buffers hold, bytes.
const BUFFER: usize = 64 * 1024;

#[tokio::test]
async fn a_half_closed_connection_says_so_and_one_that_is_not_there_says_nothing() {
    let lab = Lab::active(HandlerKind::Chargen);
    let mut client = lab.connect().await;
    let flow = lab.flow(&client);
    client.shutdown().await.unwrap();
    read_some(&mut client, 100_000).await;
    let snapshot = loop {
        let snapshot = lab.snapshot(flow).await.unwrap();
        if snapshot.fin {
            break snapshot;
        }
    };
    assert_eq!(snapshot.ack, snapshot.next.wrapping_add(1));
    assert!(!snapshot.output.is_empty());
    let other = FlowKey {
        client_port: 1,
        ..flow
    };
    assert_eq!(lab.snapshot(other).await, None);
    drop(client);
    // Its entry goes with it.
    while lab.snapshot(flow).await.is_some() {}
    lab.stop().await;
}
