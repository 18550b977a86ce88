//! The control socket: one JSON line asks, one JSON line answers, on a Unix stream.
//!
//! Whoever may open the socket may command the agent, so it is the owner's alone (mode 0600).

mod status;

use std::fs::DirBuilder;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

pub use status::{Failover, FlowCounts, Peer, ProtectionStatus, Status};

/// Most bytes of a request line.
const MAX_REQUEST: u64 = 4 * 1024;
/// Most bytes of an answer line.
const MAX_RESPONSE: u64 = 64 * 1024;
/// Clients served at a time; others wait in the backlog.
const MAX_CLIENTS: usize = 16;
/// A client has this long for its request and for reading the answer.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(5);
/// An agent needs so long for a switchover at the most: see `switchover`.
const SWITCHOVER_TIMEOUT: Duration = Duration::from_secs(60);
/// Pause after an accept error that will not go away by itself, such as EMFILE.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What may be asked.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(tag = "command", rename_all = "lowercase")]
pub enum Request {
    /// What is the node doing?
    Status,
    /// Move the VIP to the other node.
    Switchover {
        /// Although connections are lost by that.
        #[serde(default)]
        force: bool,
    },
}

/// What is answered.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Response {
    /// To [`Request::Status`].
    Status(Box<Status>),
    /// It is done.
    Done,
    /// It was not done.
    Refused {
        /// Why, as shown to the operator.
        reason: String,
    },
}

/// Why the control socket gives no answer, or no socket.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Another agent answers there.
    #[error("control {path}: an agent is already running on it; stop it first", path = .0.display())]
    InUse(PathBuf),
    /// Something else than a socket has that name.
    #[error("control {path}: found a file that is not a socket, expected none or a dead agent's socket; move it away or change `control:`", path = .0.display())]
    NotASocket(PathBuf),
    /// The socket or its directory cannot be made.
    #[error("control {path}: cannot listen: {error}; the directory must be writable, run as root or change `control:`", path = .path.display())]
    Bind {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// Nobody answers.
    #[error("control {path}: no agent answers: {error}; start rfsis-agent, or run as its user", path = .path.display())]
    Unreachable {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// The answer is not one.
    #[error("control {path}: found an answer that cannot be read ({reason}), expected one JSON line; are client and agent of one version?", path = .path.display())]
    Garbled {
        /// The socket.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
}

/// Listens on `path`, mode 0600; makes its directory (0755) and replaces a dead agent's socket.
///
/// # Errors
/// [`ControlError::InUse`], [`ControlError::NotASocket`], [`ControlError::Bind`].
pub fn bind(path: &Path) -> Result<UnixListener, ControlError> {
    let fail = |error| ControlError::Bind {
        path: path.to_owned(),
        error,
    };
    if let Some(directory) = path.parent() {
        DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(directory)
            .map_err(fail)?;
    }
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(fail(error)),
        Ok(found) if !found.file_type().is_socket() => {
            return Err(ControlError::NotASocket(path.to_owned()));
        }
        Ok(_) => match UnixStream::connect(path) {
            Ok(_) => return Err(ControlError::InUse(path.to_owned())),
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                std::fs::remove_file(path).map_err(fail)?;
            }
            Err(error) => return Err(fail(error)),
        },
    }
    listen(path).map_err(fail)
}

fn listen(path: &Path) -> io::Result<UnixListener> {
    use nix::sys::stat::{Mode, fchmod};
    use socket2::{Domain, SockAddr, Socket, Type};

    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    // Before bind, so that the file never exists with a wider mode: `unix_bind_bsd` in
    // net/unix/af_unix.c takes the mode of the socket's inode.
    fchmod(&socket, Mode::S_IRUSR | Mode::S_IWUSR)?;
    socket.bind(&SockAddr::unix(path)?)?;
    socket.listen(128)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

/// Answers until cancelled, then removes the socket file.
pub async fn serve<A: Future<Output = Response> + Send>(
    listener: UnixListener,
    handle: impl Fn(Request) -> A + Clone + Send + Sync + 'static,
    cancel: CancellationToken,
) {
    let path = listener
        .local_addr()
        .ok()
        .and_then(|address| address.as_pathname().map(Path::to_owned));
    let listener = match tokio::net::UnixListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => {
            tracing::error!(%error, "control socket is not served");
            return;
        }
    };
    tokio::select! {
        () = cancel.cancelled() => {}
        () = accept(&listener, handle, &cancel) => {}
    }
    if let Some(path) = path
        && let Err(error) = std::fs::remove_file(&path)
    {
        tracing::warn!(path = %path.display(), %error, "control socket is left behind");
    }
}

async fn accept<A: Future<Output = Response> + Send>(
    listener: &tokio::net::UnixListener,
    handle: impl Fn(Request) -> A + Clone + Send + Sync + 'static,
    cancel: &CancellationToken,
) {
    let clients = Arc::new(Semaphore::new(MAX_CLIENTS));
    while let Ok(permit) = Arc::clone(&clients).acquire_owned().await {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "control: cannot accept");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let handle = handle.clone();
        let cancel = cancel.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = cancel.cancelled() => {}
                outcome = converse(stream, handle) => if let Err(error) = outcome {
                    tracing::debug!(%error, "control: client left, or is too slow");
                }
            }
            drop(permit);
        });
    }
}

async fn converse<A: Future<Output = Response>>(
    stream: tokio::net::UnixStream,
    handle: impl Fn(Request) -> A,
) -> io::Result<()> {
    let (reader, mut writer) = stream.into_split();
    let mut line = Vec::new();
    let mut reader = tokio::io::BufReader::new(reader.take(MAX_REQUEST));
    timeout(CLIENT_TIMEOUT, reader.read_until(b'\n', &mut line)).await??;
    let response = match serde_json::from_slice::<Request>(&line) {
        Ok(request) => handle(request).await,
        Err(error) => Response::Refused {
            reason: format!(
                "found a request that cannot be read ({error}), expected one JSON line like {{\"command\":\"status\"}}"
            ),
        },
    };
    let mut answer = serde_json::to_vec(&response)?;
    answer.push(b'\n');
    timeout(CLIENT_TIMEOUT, writer.write_all(&answer)).await?
}

/// Asks the agent behind `path`. Blocks, at most about five seconds; for a switchover, a minute.
///
/// # Errors
/// [`ControlError::Unreachable`], [`ControlError::Garbled`].
pub fn ask(path: &Path, request: Request) -> Result<Response, ControlError> {
    let line = exchange(path, request).map_err(|error| ControlError::Unreachable {
        path: path.to_owned(),
        error,
    })?;
    serde_json::from_slice(&line).map_err(|error| ControlError::Garbled {
        path: path.to_owned(),
        reason: error.to_string(),
    })
}

fn exchange(path: &Path, request: Request) -> io::Result<Vec<u8>> {
    let mut stream = UnixStream::connect(path)?;
    let patience = match request {
        Request::Status => CLIENT_TIMEOUT,
        Request::Switchover { .. } => SWITCHOVER_TIMEOUT,
    };
    stream.set_read_timeout(Some(patience))?;
    stream.set_write_timeout(Some(CLIENT_TIMEOUT))?;
    let mut question = serde_json::to_vec(&request)?;
    question.push(b'\n');
    stream.write_all(&question)?;
    let mut line = Vec::new();
    BufReader::new(stream.take(MAX_RESPONSE)).read_until(b'\n', &mut line)?;
    Ok(line)
}

#[cfg(test)]
mod tests {
    use super::status::tests::status;
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use tempfile::TempDir;

    /// Answers `status` and refuses the rest, until dropped.
    struct Server {
        directory: TempDir,
        cancel: CancellationToken,
        task: Option<tokio::task::JoinHandle<()>>,
    }

    impl Server {
        fn start() -> Server {
            let directory = TempDir::new().unwrap();
            let cancel = CancellationToken::new();
            let listener = bind(&directory.path().join("run/agent.sock")).unwrap();
            let answer = async |request| match request {
                Request::Status => Response::Status(Box::new(status())),
                Request::Switchover { force: true } => Response::Done,
                Request::Switchover { force: false } => Response::Refused {
                    reason: "3 flows are unprotected".into(),
                },
            };
            let task = tokio::spawn(serve(listener, answer, cancel.clone()));
            Server {
                directory,
                cancel,
                task: Some(task),
            }
        }

        fn path(&self) -> PathBuf {
            self.directory.path().join("run/agent.sock")
        }

        async fn ask(&self, request: Request) -> Result<Response, ControlError> {
            let path = self.path();
            tokio::task::spawn_blocking(move || ask(&path, request))
                .await
                .unwrap()
        }

        /// Sends raw bytes, closes its side, returns what came back.
        async fn raw(&self, bytes: &[u8]) -> String {
            let mut stream = tokio::net::UnixStream::connect(self.path()).await.unwrap();
            // The server may hang up before it has read everything.
            let _ = stream.write_all(bytes).await;
            let _ = stream.shutdown().await;
            let mut answer = String::new();
            let _ = stream.read_to_string(&mut answer).await;
            answer
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn status_travels_whole_and_so_do_a_refusal_and_what_forces_it() {
        let server = Server::start();
        let answer = server.ask(Request::Status).await.unwrap();
        assert_eq!(answer, Response::Status(Box::new(status())));
        let switchover = |force| server.ask(Request::Switchover { force });
        let Response::Refused { reason } = switchover(false).await.unwrap() else {
            panic!("not refused");
        };
        assert_eq!(reason, "3 flows are unprotected");
        assert_eq!(switchover(true).await.unwrap(), Response::Done);
        let bare = server.raw(b"{\"command\":\"switchover\"}\n").await;
        assert!(
            bare.starts_with("{\"refused\""),
            "without a word it is not forced: {bare}"
        );
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn the_socket_is_the_owners_alone_and_goes_with_the_server() {
        let mut server = Server::start();
        let path = server.path();
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&path), 0o600);
        assert_eq!(mode(path.parent().unwrap()), 0o755);
        server.cancel.cancel();
        server.task.take().unwrap().await.unwrap();
        assert!(!path.exists());
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_live_socket_is_refused_and_a_dead_one_replaced() {
        let server = Server::start();
        let error = bind(&server.path()).unwrap_err();
        assert!(matches!(error, ControlError::InUse(_)));
        assert!(error.to_string().contains("an agent is already running on"));
        assert!(server.ask(Request::Status).await.is_ok());

        let dead = server.directory.path().join("dead.sock");
        drop(bind(&dead).unwrap());
        assert!(dead.exists());
        drop(bind(&dead).unwrap());
    }

    #[test]
    fn a_file_that_is_no_socket_is_never_replaced() {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("agent.sock");
        std::fs::write(&path, "precious").unwrap();
        assert!(matches!(bind(&path), Err(ControlError::NotASocket(_))));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
    }

    #[test]
    fn without_an_agent_the_answer_names_the_socket() {
        let error = ask(Path::new("/nonexistent/agent.sock"), Request::Status).unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("control /nonexistent/agent.sock: no agent answers")
        );
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn garbage_and_endless_lines_are_refused() {
        let server = Server::start();
        for bytes in [
            b"\n".to_vec(),
            b"{\"command\":\"reboot\"}\n".to_vec(),
            b"\xff\x00\n".to_vec(),
            vec![b'{'; MAX_REQUEST as usize],
        ] {
            assert!(
                server.raw(&bytes).await.starts_with("{\"refused\""),
                "{bytes:?}"
            );
        }
        // More than a line may hold: the rest is not read, the answer may be lost to the reset.
        server.raw(&vec![b' '; 1 << 20]).await;
        assert!(server.ask(Request::Status).await.is_ok());
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn silent_clients_hold_no_more_than_their_places_and_lose_them_in_time() {
        let server = Server::start();
        let mut silent = Vec::new();
        for _ in 0..MAX_CLIENTS {
            silent.push(
                tokio::net::UnixStream::connect(server.path())
                    .await
                    .unwrap(),
            );
        }
        let asked = std::time::Instant::now();
        let mut patient = tokio::net::UnixStream::connect(server.path())
            .await
            .unwrap();
        patient
            .write_all(b"{\"command\":\"status\"}\n")
            .await
            .unwrap();
        let mut answer = String::new();
        patient.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("{\"status\""));
        let waited = asked.elapsed();
        assert!(
            waited > CLIENT_TIMEOUT / 2 && waited < CLIENT_TIMEOUT * 2,
            "{waited:?}"
        );
    }
}
