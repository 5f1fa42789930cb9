//! WireGuard in user space, for kernels that have none: one small process per interface.
//!
//! A tunnel has to outlive the command that made it, since connections run through it long after
//! the migration. So the device does not live in that command but in a process of its own, started
//! from the same program, in a session of its own. It is configured through the socket that every
//! userspace WireGuard has (<https://www.wireguard.com/xplatform/>), so `wg show` works on it.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use gotatun::device::uapi::UapiServer;
use rustix::net::sockopt;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use wireguard_uapi::xplatform::{Client, set};

use super::error::{Error, Result, file};
use super::key::PrivateKey;
use super::process::Process;
use super::registry::HopSpec;
use super::{Configuration, Status, bounded, device, interface};

/// Where every userspace WireGuard has its sockets, and where `wg` looks for them.
pub const UAPI_DIRECTORY: &str = "/var/run/wireguard";

/// The hidden subcommand of the helper program that is to call [`run_device`] with the two
/// arguments that follow it: the interface and the socket.
pub const DEVICE_COMMAND: &str = "tunnel-device";

pub use super::device::MAX_MTU;

/// How long a new process may take until its socket answers.
pub(super) const START: Duration = Duration::from_secs(10);
/// How long a process may take to clean up before it is killed.
pub(super) const STOP: Duration = Duration::from_secs(2);
/// How often its socket is tried.
const POLL: Duration = Duration::from_millis(5);
/// How often the process looks whether its interface is still there.
const WATCH: Duration = Duration::from_millis(500);
/// How urgent the process is, as nice(1) counts it. It does what a kernel would do at once, and on a
/// busy machine its queues would overflow while it waits behind the programs whose packets are in
/// them. Much further down it would be woken for each packet alone, and streams would be slower.
const NICENESS: i32 = -10;
/// How much of the log is worth showing.
const LOG_TAIL: usize = 2048;

/// Whether a device answers on this socket.
pub(super) fn answers(socket: &Path) -> bool {
    UnixStream::connect(socket).is_ok()
}

/// The process that listens on this socket, if one does.
pub(super) fn process_behind(socket: &Path) -> Option<Process> {
    let stream = UnixStream::connect(socket).ok()?;
    let credentials = sockopt::socket_peercred(&stream).ok()?;
    Process::running(credentials.pid.as_raw_nonzero().get())
}

/// Starts the process of a hop's device and waits until it can be configured. `started` is called
/// as soon as the process exists.
pub(super) async fn start(
    helper: &Path,
    spec: &HopSpec,
    log: &Path,
    within: Duration,
    started: impl FnOnce(Process) -> Result<()>,
) -> Result<()> {
    let output = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(log)
        .map_err(file("create", log))?;
    let mut child = Command::new(helper)
        .arg(DEVICE_COMMAND)
        .arg(&spec.interface)
        .arg(&spec.socket)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::from(output))
        .spawn()
        .map_err(|source| Error::Spawn {
            helper: helper.to_owned(),
            interface: spec.interface.clone(),
            source,
        })?;
    let process = i32::try_from(child.id()).ok().and_then(Process::running);
    let (report, mut ended) = oneshot::channel::<io::Result<ExitStatus>>();
    // The process outlives us as a rule. If it does not, someone has to take note of its end, or
    // its number stays occupied for as long as we run: a thread that does nothing else.
    std::thread::Builder::new()
        .name(format!("{}-reaper", spec.interface))
        .spawn(move || {
            // The receiver is gone once the device is ready.
            let _ = report.send(child.wait());
        })
        .map_err(|source| Error::Spawn {
            helper: helper.to_owned(),
            interface: spec.interface.clone(),
            source,
        })?;
    if let Some(process) = process {
        started(process)?;
    }

    let deadline = Instant::now() + within;
    loop {
        if answers(&spec.socket) {
            return Ok(());
        }
        if let Ok(status) = ended.try_recv() {
            return Err(Error::Device {
                interface: spec.interface.clone(),
                what: match status {
                    Ok(status) => format!("ended ({status})"),
                    Err(error) => format!("was lost ({error})"),
                },
                log: tail(log),
            });
        }
        if Instant::now() >= deadline {
            if let Some(process) = process {
                process.end(&spec.interface, STOP).await?;
            }
            return Err(Error::Device {
                interface: spec.interface.clone(),
                what: format!("was not ready after {} s", within.as_secs()),
                log: tail(log),
            });
        }
        tokio::time::sleep(POLL).await;
    }
}

fn tail(log: &Path) -> String {
    use std::io::{Read as _, Seek as _, SeekFrom};
    let read = || -> io::Result<Vec<u8>> {
        let mut log = File::open(log)?;
        let length = log.metadata()?.len();
        log.seek(SeekFrom::Start(length.saturating_sub(LOG_TAIL as u64)))?;
        let mut bytes = Vec::new();
        log.take(LOG_TAIL as u64).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    // Without a log there is nothing to add to the error.
    String::from_utf8_lossy(&read().unwrap_or_default())
        .trim()
        .to_owned()
}

/// Gives the device its key and port, which it binds at once.
pub(super) async fn set_key(spec: &HopSpec, key: &PrivateKey, port: u16) -> Result<()> {
    let socket = spec.socket.clone();
    let key = key.expose();
    bounded("set the key", &spec.interface, move || {
        let device = set::Device {
            private_key: Some(key),
            listen_port: Some(port),
            ..set::Device::default()
        };
        Client::create(socket)
            .set(device)
            .map_err(|error| explain(&error))
    })
    .await
}

/// Gives the device its only peer.
pub(super) async fn set_peer(spec: &HopSpec, peer: Configuration) -> Result<()> {
    let socket = spec.socket.clone();
    bounded("set the peer", &spec.interface, move || {
        let allowed = super::everything().map(|ipaddr| set::AllowedIp {
            ipaddr,
            cidr_mask: 0,
        });
        let entry = set::Peer::from_public_key(*peer.key.as_bytes())
            .endpoint(peer.endpoint)
            .persistent_keepalive_interval(peer.keepalive)
            .replace_allowed_ips(true)
            .allowed_ips(allowed.to_vec());
        let device = set::Device {
            replace_peers: Some(true),
            peers: vec![entry],
            ..set::Device::default()
        };
        Client::create(socket)
            .set(device)
            .map_err(|error| explain(&error))
    })
    .await
}

/// What the device counted.
pub(super) async fn status(spec: &HopSpec) -> Result<Status> {
    let socket = spec.socket.clone();
    let device = bounded("read the state", &spec.interface, move || {
        // Only the Display of the error: it names a key of the protocol, never its value.
        Client::create(socket)
            .get()
            .map_err(|error| error.to_string())
    })
    .await?;
    Ok(Status::of(&device.peers))
}

fn explain(error: &wireguard_uapi::xplatform::error::SetDeviceError) -> String {
    use wireguard_uapi::xplatform::error::SetDeviceError;
    match error {
        SetDeviceError::ServerError(number) => match number.parse::<i32>() {
            Ok(number) => io::Error::from_raw_os_error(number.abs()).to_string(),
            Err(_) => "the device refused it".into(),
        },
        other => other.to_string(),
    }
}

/// Runs a WireGuard device on a new interface until SIGTERM comes or the interface is removed,
/// configurable through `socket`. This is the whole life of the process that [`DEVICE_COMMAND`]
/// starts.
///
/// It takes its process out of the session of whoever started it, and makes it ignore SIGINT and
/// SIGHUP. It should run in a runtime of a single thread: a packet passes from task to task, and to
/// wake another thread each time costs more than what is done there.
///
/// Tracing below `info` must stay off in this process: gotatun traces requests, keys included.
///
/// # Errors
/// [`Error::Create`] if there can be no interface, and those of the socket's file.
pub async fn run_device(interface: &str, socket: &Path) -> Result<()> {
    // A Ctrl-C in the terminal that we were started from is not for us. This fails only for the
    // leader of a process group, who was given one of its own already.
    let _ = rustix::process::setsid();
    // Of this thread, which is the one that all packets pass.
    if let Err(error) = rustix::process::setpriority_process(None, NICENESS) {
        tracing::debug!(%error, "the device is no more urgent than other processes");
    }
    let mut terminate = handle(SignalKind::terminate())?;
    let mut interrupt = handle(SignalKind::interrupt())?;
    let mut hang_up = handle(SignalKind::hangup())?;

    let create = |reason: String| Error::Create {
        interface: interface.to_owned(),
        reason,
    };
    let (client, server) = UapiServer::new();
    let mut device = device::build(interface, server)
        .await
        .map_err(|error| create(error.to_string()))?;
    let index = interface::index_of(interface);

    // Last, so that whoever reaches the socket finds a device behind it.
    let listener = listen(socket)?;
    let watch = async {
        loop {
            tokio::time::sleep(WATCH).await;
            if interface::index_of(interface) != index {
                return;
            }
        }
    };
    let serve = async {
        loop {
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::debug!(%error, "a connection to the device's socket failed");
                    tokio::time::sleep(POLL).await;
                    continue;
                }
            };
            // From here on a thread reads it, which must not wait for ever for a silent client.
            let prepared = stream.into_std().and_then(|stream| {
                stream.set_nonblocking(false)?;
                stream.set_read_timeout(Some(START))?;
                stream.set_write_timeout(Some(START))?;
                Ok(stream)
            });
            if let Ok(stream) = prepared {
                client.clone().wrap_read_write(stream);
            }
        }
    };
    let ignore = async {
        loop {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = hang_up.recv() => {}
            }
        }
    };
    tokio::select! {
        _ = terminate.recv() => {}
        () = device.wait() => {}
        () = watch => {}
        () = serve => {}
        () = ignore => {}
    }
    // The socket first: whoever still reaches it expects answers.
    let removed = match std::fs::remove_file(socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(file("remove", socket)(error)),
        _ => Ok(()),
    };
    // The interface goes when its descriptor is closed, at the latest with this process.
    let _ = tokio::time::timeout(STOP / 2, device.stop()).await;
    removed
}

fn handle(kind: SignalKind) -> Result<tokio::signal::unix::Signal> {
    signal(kind).map_err(file("handle signals of", Path::new("/proc/self")))
}

/// A socket that root alone can use, in place of one that nobody serves any more.
fn listen(socket: &Path) -> Result<tokio::net::UnixListener> {
    if let Some(directory) = socket.parent() {
        std::fs::create_dir_all(directory).map_err(file("create", directory))?;
    }
    if answers(socket) {
        return Err(file("replace", socket)(io::ErrorKind::AddrInUse.into()));
    }
    match std::fs::remove_file(socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(file("remove", socket)(error));
        }
        _ => {}
    }
    // Between these two calls the directory's permissions protect it no less than root's umask
    // protects every other socket there; nothing can be configured before a key is.
    let listener = tokio::net::UnixListener::bind(socket).map_err(file("bind", socket))?;
    std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o600))
        .map_err(file("protect", socket))?;
    Ok(listener)
}
