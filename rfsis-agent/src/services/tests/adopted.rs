//! Connections that the kernel has adopted from shadows.

use std::sync::atomic::{AtomicUsize, Ordering};

use socket2::SockRef;

use super::*;
use crate::adopt::{OpenFlows, Unfinished};
use crate::handler::{Progress, StreamHandler};

/// A connection that somebody else has established, and what a shadow has left of it.
async fn established(lab: &Lab, unfinished: Unfinished, open: &OpenFlows) -> (TcpStream, Adopted) {
    let listener = TcpListener::bind((VIP, 0)).await.unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap());
    let (client, accepted) = tokio::join!(client, listener.accept());
    let (client, (socket, _)) = (client.unwrap(), accepted.unwrap());
    let flow = lab.flow(&client);
    let adopted = Adopted {
        socket: socket.into_std().unwrap(),
        flow,
        unfinished,
        epoch: lab.state.subscribe(),
        entry: open.enter(flow),
    };
    (client, adopted)
}

fn left(input: &[u8], promised: usize) -> Unfinished {
    Unfinished {
        handler: HandlerKind::Echo.stream(),
        input: input.to_vec(),
        promised,
    }
}

#[tokio::test]
async fn an_adopted_connection_is_served_from_where_its_shadow_stopped() {
    let mut lab = Lab::active(HandlerKind::Echo);
    let open = OpenFlows::default();
    // More than a connection reads ahead.
    let unread = vec![7; 200_000];
    let (mut client, adopted) = established(&lab, left(&unread, 0), &open).await;
    let flow = adopted.flow;
    lab.adopted.send(vec![adopted]).await.unwrap();
    assert_eq!(read_some(&mut client, unread.len()).await, unread);
    client.write_all(b"more").await.unwrap();
    assert_eq!(read_some(&mut client, 4).await, b"more");
    assert_eq!((lab.approved(), open.count(|_| true)), (vec![], 1));
    assert_eq!(lab.gate.revoked.lock().unwrap()[..], [flow]);
    client.shutdown().await.unwrap();
    assert_eq!(read_all(&mut client).await.unwrap(), b"");
    assert_eq!(lab.next_approval().await, flow);
    lab.stop().await;
    assert_eq!(open.count(|_| true), 0);
}

#[tokio::test]
async fn an_adopted_connection_ends_with_the_epoch_of_its_shadow_even_before_it_is_begun_with() {
    for begun in [true, false] {
        let lab = Lab::active(HandlerKind::Echo);
        let open = OpenFlows::default();
        let (mut client, adopted) = established(&lab, left(b"x", 0), &open).await;
        if begun {
            lab.adopted.send(vec![adopted]).await.unwrap();
            assert_eq!(read_some(&mut client, 1).await, b"x");
            lab.state.send(State::Standby).unwrap();
            lab.state.send(State::Active).unwrap();
        } else {
            lab.state.send(State::Standby).unwrap();
            lab.state.send(State::Active).unwrap();
            lab.adopted.send(vec![adopted]).await.unwrap();
        }
        assert_reset(&mut client).await;
        assert_eq!(lab.stop().await, []);
        assert_eq!(open.count(|_| true), 0);
    }
}

/// An echo that waits for its client is such a handler. Counts how often it is asked.
#[derive(Default)]
struct Deaf(Arc<AtomicUsize>);

impl StreamHandler for Deaf {
    fn advance(&mut self, _input: &[u8], _eof: bool, room: &mut [u8]) -> Progress {
        self.0.fetch_add(1, Ordering::Relaxed);
        room.fill(b'.');
        Progress {
            consumed: 0,
            produced: room.len(),
            finished: false,
        }
    }

    fn snapshot(&self) -> Vec<u8> {
        Vec::new()
    }
}

#[tokio::test]
async fn what_a_shadow_has_promised_is_read_whatever_the_handler_does() {
    const PROMISED: usize = 2 << 20;
    const KERNEL: usize = 64 << 10;
    let lab = Lab::active(HandlerKind::Echo);
    let open = OpenFlows::default();
    let deaf = Unfinished {
        handler: Box::new(Deaf::default()),
        ..left(b"", PROMISED)
    };
    let (mut client, adopted) = established(&lab, deaf, &open).await;
    // So the kernel holds little of it.
    SockRef::from(&adopted.socket)
        .set_recv_buffer_size(KERNEL)
        .unwrap();
    SockRef::from(&client).set_send_buffer_size(KERNEL).unwrap();
    lab.adopted.send(vec![adopted]).await.unwrap();
    timeout(PATIENCE, client.write_all(&vec![1; PROMISED]))
        .await
        .expect("it is read")
        .unwrap();
    // And no more than that.
    let beyond = vec![1; 1 << 20];
    let more = timeout(Duration::from_millis(500), client.write_all(&beyond)).await;
    assert!(more.is_err(), "what nobody promised waits for the handler");
    lab.stop().await;
}

#[tokio::test]
async fn while_neither_client_nor_handler_moves_nothing_runs() {
    let lab = Lab::active(HandlerKind::Echo);
    let open = OpenFlows::default();
    let calls = Arc::new(AtomicUsize::new(0));
    let deaf = Unfinished {
        handler: Box::new(Deaf(Arc::clone(&calls))),
        ..left(b"", 2 << 20)
    };
    let (mut client, adopted) = established(&lab, deaf, &open).await;
    SockRef::from(&client)
        .set_recv_buffer_size(64 << 10)
        .unwrap();
    lab.adopted.send(vec![adopted]).await.unwrap();
    client.write_all(&vec![1; 300_000]).await.unwrap();
    // Until the client takes no more either, and no longer than that.
    let mut before = 0;
    timeout(PATIENCE, async {
        loop {
            tokio::time::sleep(Duration::from_millis(200)).await;
            let now = calls.load(Ordering::Relaxed);
            if now <= before + 10 {
                break;
            }
            before = now;
        }
    })
    .await
    .expect("it rests");
    lab.stop().await;
}
