//! What runs in the lab's containers, and what talks to them from the clients.
//!
//! One program, standard library only, linked statically, so that an image is this file and little
//! else. Every server is one thread around `poll(2)`: what CRIU then has to move is a process with
//! sockets, and nothing that differs from run to run.
//!
//! # Frames
//! Servers speak frames over TCP: `length: u32` (of what follows), `kind: u8`, then
//! - kind 1, request: `number: u64`, payload. The reply is a frame of kind 2 with the same number,
//!   `served: u64`, how many requests this connection has had, and the same payload. `served` lives
//!   in the server's memory only: a reply that carries the right one comes from the process that
//!   the connection began with, not from one that was started afresh.
//! - kind 3, command: text, see [`Server::command`]. The answer is a frame of kind 4 with JSON.
//!
//! All numbers are big-endian. Clients print one JSON object at their end, and `ready` on standard
//! error as soon as all of their connections work. SIGTERM makes a client finish and print.

#[path = "workload/ring.rs"]
mod ring;
#[path = "workload/udp.rs"]
mod udp;

use std::collections::HashMap;
use std::fmt::Write as _;
use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::process::ExitCode;
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

const USAGE: &str = "\
usage: workload VERB ...
servers:
  echo PORT [--host v4|v6]                answers numbered requests; commands too
  files PORT [--lock PATH]                the same: `stat PATH` is a command; locks a file
  uring PORT                              the same, and holds an io_uring, which CRIU cannot save
  mptcp PORT                              the same, and holds a socket of MPTCP, likewise
  threads MEMBERS PORT                    the same, and so many threads; `ring` is a command
  processes MEMBERS PORT                  the same with processes
  greet PORT --control PORT [--every-ms N]  speaks first: numbered lines, by the clock or when told to
  bulk PORT                               sends and receives pseudo-random data, checks it
  udp-echo PORT [--host v4|v6]
  udp-count PORT [--host v4|v6]           counts numbered datagrams, reports when asked
  touch MIB PERCENT_PER_SECOND PORT       memory that is in use and partly rewritten; echoes too
  dial ADDR PORT --control PORT [--every-ms N]  a client in a container: `report` is a command
clients:
  client-echo ADDR PORT [--every-ms 2] [--connections 1] [--idle 0] [--payload 64]
              [--seconds N] [--until-file PATH] [--log FILE] [--grace-ms 20000]
  client-bulk ADDR PORT [--mib 64] [--rate-mib 0] [--stall-ms 60000]
  client-udp ADDR PORT [--rate 1000] [--seconds N] [--until-file PATH] [--mode echo|oneway] [--payload 16]
             [--runs 1]                   several runs from one socket, a report for each; SIGUSR1
                                          ends a run too
  client-udp-flows ADDR PORT [--flows 100] [--seconds N] [--until-file PATH]
  client-greet ADDR PORT [--seconds N] [--until-file PATH] [--lines N] [--log FILE]
  ask ADDR PORT COMMAND...                one command, its answer
tools:
  stat PATH                               what a move must preserve of a file, as JSON
  set-xattr PATH NAME VALUE";

fn main() -> ExitCode {
    let mut arguments = Arguments::from_env();
    match run(&mut arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("workload: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &mut Arguments) -> io::Result<()> {
    let verb = arguments.next("verb")?;
    stop_on_signal();
    match verb.as_str() {
        "echo" | "files" => {
            let mut server = Server::default();
            let lock = arguments.option("--lock").map(fs::File::open);
            let lock = lock.transpose()?;
            if let Some(file) = &lock {
                file.try_lock()?;
            }
            server.listen(arguments.address()?, Role::Echo)?;
            server.run()
        }
        "uring" => {
            let mut server = Server::default();
            let _ring = io_uring()?;
            server.listen(arguments.address()?, Role::Echo)?;
            server.run()
        }
        "mptcp" => {
            let mut server = Server::default();
            let _socket = mptcp()?;
            server.listen(arguments.address()?, Role::Echo)?;
            server.run()
        }
        "threads" | "processes" => {
            let mut server = Server::default();
            match verb.as_str() {
                "threads" => ring::threads(arguments)?,
                _ => ring::processes(arguments)?,
            }
            server.listen(arguments.address()?, Role::Echo)?;
            server.run()
        }
        "relay" => ring::run_relay(arguments),
        "greet" => {
            let mut server = Server::default();
            server.listen(arguments.address()?, Role::Greet)?;
            server.listen(arguments.control()?, Role::Echo)?;
            server.greeting_every = arguments.milliseconds("--every-ms")?;
            server.run()
        }
        "bulk" => {
            let mut server = Server::default();
            server.listen(arguments.address()?, Role::Bulk)?;
            server.run()
        }
        "touch" => {
            let mib = arguments.number("MIB")?;
            let percent = arguments.number("PERCENT_PER_SECOND")?;
            let mut server = Server::default();
            // Whoever can connect can count on all of it.
            server.memory = Some(Memory::new(mib, percent));
            server.listen(arguments.address()?, Role::Echo)?;
            server.run()
        }
        "dial" => {
            let peer = arguments.peer()?;
            let mut server = Server::default();
            server.listen(arguments.control()?, Role::Echo)?;
            let options = EchoOptions::from(arguments)?;
            server.dialled = Some(EchoClient::connect(peer, options)?);
            server.run()
        }
        "udp-echo" => udp::echo(arguments.address()?),
        "udp-count" => udp::count(arguments.address()?),
        "client-echo" => client_echo(arguments),
        "client-bulk" => client_bulk(arguments),
        "client-udp" => udp::client(arguments),
        "client-udp-flows" => udp::client_flows(arguments),
        "client-greet" => client_greet(arguments),
        "ask" => {
            let mut stream = connect(arguments.peer()?)?;
            let command = arguments.rest().join(" ");
            println!("{}", ask(&mut stream, &command)?);
            Ok(())
        }
        "stat" => {
            println!("{}", describe_file(Path::new(&arguments.next("PATH")?)));
            Ok(())
        }
        "set-xattr" => {
            let path = arguments.next("PATH")?;
            let name = arguments.next("NAME")?;
            set_xattr(&path, &name, &arguments.next("VALUE")?)
        }
        "--help" | "-h" => {
            println!("{USAGE}");
            Ok(())
        }
        other => Err(bad(format!("unknown verb {other}\n{USAGE}"))),
    }
}

fn bad(message: impl Into<String>) -> io::Error {
    io::Error::new(ErrorKind::InvalidInput, message.into())
}

// ------------------------------------------------------------------------------------------------
// Arguments
// ------------------------------------------------------------------------------------------------

struct Arguments {
    positional: std::vec::IntoIter<String>,
    options: HashMap<String, String>,
}

impl Arguments {
    fn from_env() -> Arguments {
        let mut positional = Vec::new();
        let mut options = HashMap::new();
        let mut all = std::env::args().skip(1);
        while let Some(argument) = all.next() {
            if argument.starts_with("--") && argument != "--help" {
                let value = all.next().unwrap_or_default();
                options.insert(argument, value);
            } else {
                positional.push(argument);
            }
        }
        Arguments {
            positional: positional.into_iter(),
            options,
        }
    }

    fn next(&mut self, what: &str) -> io::Result<String> {
        self.positional
            .next()
            .ok_or_else(|| bad(format!("{what} is missing\n{USAGE}")))
    }

    fn rest(&mut self) -> Vec<String> {
        self.positional.by_ref().collect()
    }

    fn number<T: FromStr>(&mut self, what: &str) -> io::Result<T> {
        let text = self.next(what)?;
        text.parse()
            .map_err(|_| bad(format!("{what} is not a number: {text}")))
    }

    fn option(&self, name: &str) -> Option<&str> {
        self.options.get(name).map(String::as_str)
    }

    fn option_number(&self, name: &str) -> io::Result<Option<u64>> {
        self.option(name)
            .map(|text| {
                text.parse()
                    .map_err(|_| bad(format!("{name} is not a number: {text}")))
            })
            .transpose()
    }

    fn milliseconds(&self, name: &str) -> io::Result<Option<Duration>> {
        Ok(self.option_number(name)?.map(Duration::from_millis))
    }

    fn listening(&self, port: u64) -> io::Result<SocketAddr> {
        let port = u16::try_from(port).map_err(|_| bad(format!("no such port: {port}")))?;
        Ok(match self.option("--host") {
            Some("v6") => (Ipv6Addr::UNSPECIFIED, port).into(),
            _ => (Ipv4Addr::UNSPECIFIED, port).into(),
        })
    }

    /// The address that `PORT` and `--host` name.
    fn address(&mut self) -> io::Result<SocketAddr> {
        let port = self.number("PORT")?;
        self.listening(port)
    }

    fn control(&self) -> io::Result<SocketAddr> {
        let port = self
            .option_number("--control")?
            .ok_or_else(|| bad("--control is missing"))?;
        self.listening(port)
    }

    fn peer(&mut self) -> io::Result<SocketAddr> {
        let text = self.next("ADDR")?;
        // Addresses only: a static program cannot load what resolves names.
        let address: IpAddr = text
            .parse()
            .map_err(|_| bad(format!("not an IP address: {text}")))?;
        let port: u16 = self.number("PORT")?;
        Ok((address, port).into())
    }
}

// ------------------------------------------------------------------------------------------------
// The system calls that the standard library does not have
// ------------------------------------------------------------------------------------------------

#[repr(C)]
struct PollFd {
    fd: RawFd,
    events: i16,
    revents: i16,
}

#[repr(C)]
struct TimeSpec {
    seconds: i64,
    nanoseconds: i64,
}

const POLLIN: i16 = 1;
const POLLOUT: i16 = 4;
const SIGPIPE: i32 = 13;
const SIGTERM: i32 = 15;
const SIGINT: i32 = 2;
const SIGUSR1: i32 = 10;

unsafe extern "C" {
    fn ppoll(fds: *mut PollFd, count: u64, timeout: *const TimeSpec, mask: *const u8) -> i32;
    fn signal(number: i32, handler: extern "C" fn(i32)) -> usize;
    fn lsetxattr(
        path: *const u8,
        name: *const u8,
        value: *const u8,
        size: usize,
        flags: i32,
    ) -> i32;
    fn llistxattr(path: *const u8, list: *mut u8, size: usize) -> isize;
    fn lgetxattr(path: *const u8, name: *const u8, value: *mut u8, size: usize) -> isize;
    fn syscall(number: i64, ...) -> i64;
    fn socket(family: i32, kind: i32, protocol: i32) -> i32;
    fn listen(socket: i32, backlog: i32) -> i32;
}

/// Listens with a socket of MPTCP, as some languages' libraries do it where they were asked for one of
/// TCP.
fn mptcp() -> io::Result<OwnedFd> {
    /// `AF_INET` and `SOCK_STREAM`; `IPPROTO_MPTCP` of linux/in.h.
    const INET: i32 = 2;
    const STREAM: i32 = 1;
    const MPTCP: i32 = 262;
    // SAFETY: takes numbers only.
    let socket = match unsafe { socket(INET, STREAM, MPTCP) } {
        // SAFETY: the kernel just made it, for us alone.
        socket if socket >= 0 => unsafe { OwnedFd::from_raw_fd(socket) },
        _ => return Err(io::Error::last_os_error()),
    };
    // SAFETY: takes numbers only. It gets a port by itself.
    match unsafe { listen(socket.as_raw_fd(), 1) } {
        0 => Ok(socket),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Makes an io_uring that nobody submits anything to.
fn io_uring() -> io::Result<OwnedFd> {
    /// `io_uring_setup` in the kernel's asm-generic/unistd.h; the same on x86-64.
    const SETUP: i64 = 425;
    const ENTRIES: u32 = 4;
    // `struct io_uring_params` has 120 bytes; all zero is a plain ring.
    let mut parameters = [0u64; 15];
    // SAFETY: the kernel writes no more than the structure, whose size this is.
    match unsafe { syscall(SETUP, ENTRIES, parameters.as_mut_ptr()) } {
        // SAFETY: the kernel just made it, for us alone.
        ring if ring >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(ring as RawFd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

static STOP: AtomicBool = AtomicBool::new(false);
/// What goes on in parts is to begin its next one.
static NEXT: AtomicBool = AtomicBool::new(false);

extern "C" fn on_signal(number: i32) {
    match number {
        SIGPIPE => {}
        SIGUSR1 => NEXT.store(true, Ordering::Relaxed),
        _ => STOP.store(true, Ordering::Relaxed),
    }
}

/// In a container this program is PID 1, for which signals without a handler do nothing.
fn stop_on_signal() {
    for number in [SIGTERM, SIGINT, SIGPIPE, SIGUSR1] {
        // SAFETY: the handler only stores to atomics.
        unsafe { signal(number, on_signal) };
    }
}

fn stopped() -> bool {
    STOP.load(Ordering::Relaxed)
}

/// Waits for the descriptors, no longer than `timeout`. An interrupted wait is not an error:
/// checkpoint and restore interrupt it too.
fn poll(fds: &mut [PollFd], timeout: Duration) -> io::Result<()> {
    let timeout = TimeSpec {
        seconds: timeout.as_secs() as i64,
        nanoseconds: i64::from(timeout.subsec_nanos()),
    };
    // SAFETY: the slice and the time outlive the call; a null mask leaves the signal mask alone.
    let ready = unsafe {
        ppoll(
            fds.as_mut_ptr(),
            fds.len() as u64,
            &timeout,
            std::ptr::null(),
        )
    };
    if ready < 0 {
        let error = io::Error::last_os_error();
        for fd in fds {
            fd.revents = 0;
        }
        if error.kind() != ErrorKind::Interrupted {
            return Err(error);
        }
    }
    Ok(())
}

fn terminated(text: &[u8]) -> Vec<u8> {
    let mut out = text.to_vec();
    out.push(0);
    out
}

fn set_xattr(path: &str, name: &str, value: &str) -> io::Result<()> {
    let (path, name) = (terminated(path.as_bytes()), terminated(name.as_bytes()));
    // SAFETY: both strings end with a zero, the value has the length given.
    match unsafe { lsetxattr(path.as_ptr(), name.as_ptr(), value.as_ptr(), value.len(), 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn xattrs(path: &Path) -> Vec<(String, Vec<u8>)> {
    let path = terminated(path.as_os_str().as_bytes());
    let mut names = vec![0u8; 65536];
    // SAFETY: the buffer has the size given.
    let size = unsafe { llistxattr(path.as_ptr(), names.as_mut_ptr(), names.len()) };
    let mut found = Vec::new();
    for name in names[..usize::try_from(size).unwrap_or(0)].split(|&byte| byte == 0) {
        if name.is_empty() {
            continue;
        }
        let mut value = vec![0u8; 65536];
        let wanted = terminated(name);
        // SAFETY: as above.
        let size = unsafe {
            lgetxattr(
                path.as_ptr(),
                wanted.as_ptr(),
                value.as_mut_ptr(),
                value.len(),
            )
        };
        value.truncate(usize::try_from(size).unwrap_or(0));
        found.push((String::from_utf8_lossy(name).into_owned(), value));
    }
    found.sort();
    found
}

// ------------------------------------------------------------------------------------------------
// Data that both sides can make and check
// ------------------------------------------------------------------------------------------------

/// The word at a position of the pseudo-random stream of a seed (SplitMix64).
fn word(seed: u64, index: u64) -> u64 {
    let mut z = seed.wrapping_add(index.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn stream_byte(seed: u64, position: u64) -> u8 {
    word(seed, position / 8).to_be_bytes()[(position % 8) as usize]
}

fn stream_bytes(seed: u64, position: u64, count: usize, out: &mut Vec<u8>) {
    let end = position + count as u64;
    let mut at = position;
    while at < end {
        if at % 8 == 0 && end - at >= 8 {
            out.extend_from_slice(&word(seed, at / 8).to_be_bytes());
            at += 8;
        } else {
            out.push(stream_byte(seed, at));
            at += 1;
        }
    }
}

/// FNV-1a: enough to tell whether two files or streams are the same by accident.
fn checksum(sum: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(sum, |sum, &byte| {
        (sum ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}
const CHECKSUM_START: u64 = 0xcbf2_9ce4_8422_2325;

fn json_string(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => {
                out.push('\\');
                out.push(c);
            }
            c if u32::from(c) < 0x20 => {
                let _ = write!(out, "\\u{:04x}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

/// What a move must preserve of a file. The inode number only says which names are one file.
fn describe_file(path: &Path) -> String {
    let name = json_string(&path.to_string_lossy());
    let Ok(meta) = fs::symlink_metadata(path) else {
        return format!("{{\"path\":{name},\"kind\":\"absent\"}}");
    };
    let kind = meta.file_type();
    let (kind, content) = if kind.is_file() {
        ("file", fs::read(path).unwrap_or_default())
    } else if kind.is_dir() {
        let mut names: Vec<_> = fs::read_dir(path)
            .map(|entries| {
                entries
                    .flatten()
                    .map(|entry| entry.file_name().as_bytes().to_vec())
                    .collect()
            })
            .unwrap_or_default();
        names.sort();
        ("directory", names.join(&b'\n'))
    } else if kind.is_symlink() {
        let target = fs::read_link(path).unwrap_or_default();
        ("symlink", target.as_os_str().as_bytes().to_vec())
    } else if kind.is_fifo() {
        ("fifo", Vec::new())
    } else if kind.is_socket() {
        ("socket", Vec::new())
    } else {
        ("device", Vec::new())
    };
    let mut attributes = String::new();
    for (name, value) in xattrs(path) {
        let value = json_string(&String::from_utf8_lossy(&value));
        let comma = if attributes.is_empty() { "" } else { "," };
        let _ = write!(attributes, "{comma}{}:{value}", json_string(&name));
    }
    format!(
        "{{\"path\":{name},\"kind\":\"{kind}\",\"size\":{},\"sum\":\"{:016x}\",\"mode\":\"{:04o}\",\
         \"uid\":{},\"gid\":{},\"links\":{},\"inode\":{},\"rdev\":{},\"xattrs\":{{{attributes}}}}}",
        if kind == "directory" { 0 } else { meta.size() },
        checksum(CHECKSUM_START, &content),
        meta.mode() & 0o7777,
        meta.uid(),
        meta.gid(),
        if kind == "directory" { 0 } else { meta.nlink() },
        meta.ino(),
        meta.rdev(),
    )
}

// ------------------------------------------------------------------------------------------------
// Frames
// ------------------------------------------------------------------------------------------------

const REQUEST: u8 = 1;
const REPLY: u8 = 2;
const COMMAND: u8 = 3;
const ANSWER: u8 = 4;
const LONGEST_FRAME: usize = 1 << 20;

fn put_frame(out: &mut Vec<u8>, kind: u8, parts: &[&[u8]]) {
    let length: usize = parts.iter().map(|part| part.len()).sum();
    out.extend_from_slice(&(length as u32 + 1).to_be_bytes());
    out.push(kind);
    for part in parts {
        out.extend_from_slice(part);
    }
}

/// Connects. A server in a container that was just started may not listen yet, so a refusal is not
/// taken for an answer at once; a connection that was made is never made again.
fn connect(peer: SocketAddr) -> io::Result<TcpStream> {
    let started = Instant::now();
    loop {
        match TcpStream::connect_timeout(&peer, Duration::from_secs(10)) {
            Err(error)
                if error.kind() == ErrorKind::ConnectionRefused
                    && started.elapsed() < Duration::from_secs(5)
                    && !stopped() =>
            {
                poll(&mut [], TICK)?;
            }
            other => return other,
        }
    }
}

/// Takes one whole frame off the front of a buffer.
fn take_frame(buffer: &mut Vec<u8>) -> io::Result<Option<(u8, Vec<u8>)>> {
    let Some(head) = buffer.first_chunk::<4>() else {
        return Ok(None);
    };
    let length = u32::from_be_bytes(*head) as usize;
    if length == 0 || length > LONGEST_FRAME {
        return Err(bad(format!("a frame of {length} bytes")));
    }
    if buffer.len() < 4 + length {
        return Ok(None);
    }
    let body = buffer[5..4 + length].to_vec();
    let kind = buffer[4];
    buffer.drain(..4 + length);
    Ok(Some((kind, body)))
}

fn number_at(bytes: &[u8], at: usize) -> io::Result<u64> {
    bytes
        .get(at..at + 8)
        .and_then(|slice| slice.try_into().ok())
        .map(u64::from_be_bytes)
        .ok_or_else(|| bad("a frame is too short"))
}

fn ask(stream: &mut TcpStream, command: &str) -> io::Result<String> {
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    let mut out = Vec::new();
    put_frame(&mut out, COMMAND, &[command.as_bytes()]);
    stream.write_all(&out)?;
    let mut buffer = Vec::new();
    loop {
        if let Some((kind, body)) = take_frame(&mut buffer)? {
            if kind == ANSWER {
                return Ok(String::from_utf8_lossy(&body).into_owned());
            }
            continue;
        }
        let mut chunk = [0; 4096];
        match stream.read(&mut chunk)? {
            0 => return Err(bad("the server closed the connection")),
            n => buffer.extend_from_slice(&chunk[..n]),
        }
    }
}

/// A connection that is never waited on: what arrived, and what is still to be sent.
struct Pipe {
    stream: TcpStream,
    input: Vec<u8>,
    output: Vec<u8>,
    sent: usize,
}

impl Pipe {
    fn new(stream: TcpStream) -> io::Result<Pipe> {
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
        Ok(Pipe {
            stream,
            input: Vec::new(),
            output: Vec::new(),
            sent: 0,
        })
    }

    /// Bytes not yet handed to the kernel.
    fn pending(&self) -> usize {
        self.output.len() - self.sent
    }

    fn interest(&self) -> PollFd {
        // A peer that does not read must not make us hold ever more for it.
        let read = if self.pending() < LONGEST_FRAME {
            POLLIN
        } else {
            0
        };
        let write = if self.pending() > 0 { POLLOUT } else { 0 };
        PollFd {
            fd: self.stream.as_raw_fd(),
            events: read | write,
            revents: 0,
        }
    }

    /// Reads what is there. Returns the number of bytes; the end of the stream is an error.
    fn receive(&mut self) -> io::Result<usize> {
        let mut chunk = [0; 65536];
        match self.stream.read(&mut chunk) {
            Ok(0) => Err(ErrorKind::UnexpectedEof.into()),
            Ok(n) => {
                self.input.extend_from_slice(&chunk[..n]);
                Ok(n)
            }
            Err(error) if is_transient(&error) => Ok(0),
            Err(error) => Err(error),
        }
    }

    fn send(&mut self) -> io::Result<()> {
        while self.pending() > 0 {
            match self.stream.write(&self.output[self.sent..]) {
                Ok(n) => self.sent += n,
                Err(error) if is_transient(&error) => break,
                Err(error) => return Err(error),
            }
        }
        // Moving the rest to the front costs: only now and then while there is a rest.
        if self.pending() == 0 || self.sent > LONGEST_FRAME {
            self.output.drain(..self.sent);
            self.sent = 0;
        }
        Ok(())
    }
}

fn is_transient(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

// ------------------------------------------------------------------------------------------------
// Servers over TCP
// ------------------------------------------------------------------------------------------------

#[derive(Clone, Copy, PartialEq)]
enum Role {
    Echo,
    Greet,
    Bulk,
}

struct Connection {
    pipe: Pipe,
    role: Role,
    /// Requests answered, or lines pushed.
    served: u64,
    transfer: Option<Transfer>,
}

#[derive(Default)]
struct Server {
    listeners: Vec<(TcpListener, Role)>,
    connections: Vec<Connection>,
    accepted: u64,
    open: usize,
    greeting_every: Option<Duration>,
    memory: Option<Memory>,
    dialled: Option<EchoClient>,
    /// A command asked for a line to every greeted connection.
    say: bool,
}

/// How often a server looks at its clock.
const TICK: Duration = Duration::from_millis(10);

impl Server {
    fn listen(&mut self, address: SocketAddr, role: Role) -> io::Result<()> {
        let listener = TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        self.listeners.push((listener, role));
        Ok(())
    }

    fn run(&mut self) -> io::Result<()> {
        let mut greeted = Instant::now();
        let mut touched = Instant::now();
        while !stopped() {
            let wait = if self.needs_ticks() {
                TICK
            } else {
                Duration::from_secs(3600)
            };
            let wait = match &self.dialled {
                Some(client) => wait.min(client.until_next()),
                None => wait,
            };
            let mut fds: Vec<PollFd> = self
                .listeners
                .iter()
                .map(|(listener, _)| PollFd {
                    fd: listener.as_raw_fd(),
                    events: POLLIN,
                    revents: 0,
                })
                .chain(
                    self.connections
                        .iter()
                        .map(|connection| connection.pipe.interest()),
                )
                .collect();
            let served = fds.len();
            if let Some(client) = &self.dialled {
                fds.extend(client.interests());
            }
            poll(&mut fds, wait)?;

            let ready: Vec<bool> = fds.iter().map(|fd| fd.revents != 0).collect();
            let first = self.listeners.len();
            let mut at = first;
            let mut connections = std::mem::take(&mut self.connections);
            self.open = connections.len();
            connections.retain_mut(|connection| {
                let kept = !ready[at] || self.serve(connection).is_ok();
                at += 1;
                kept
            });
            self.connections = connections;
            for listener in 0..first {
                if ready[listener] {
                    self.accept(listener)?;
                }
            }
            if let Some(client) = &mut self.dialled {
                client.step(&fds[served..])?;
            }

            if let Some(memory) = &mut self.memory {
                memory.touch(touched.elapsed());
                touched = Instant::now();
            }
            if self
                .greeting_every
                .is_some_and(|every| greeted.elapsed() >= every)
            {
                greeted = Instant::now();
                self.say = true;
            }
            if std::mem::take(&mut self.say) {
                for connection in self
                    .connections
                    .iter_mut()
                    .filter(|c| c.role == Role::Greet)
                {
                    let line = format!("line {}\n", connection.served);
                    connection.pipe.output.extend_from_slice(line.as_bytes());
                    connection.served += 1;
                    let _ = connection.pipe.send();
                }
            }
            for connection in &mut self.connections {
                if let Some(transfer) = &mut connection.transfer {
                    transfer.fill(&mut connection.pipe);
                    let _ = connection.pipe.send();
                }
            }
        }
        Ok(())
    }

    fn needs_ticks(&self) -> bool {
        self.greeting_every.is_some()
            || self.memory.as_ref().is_some_and(Memory::changes)
            || self
                .connections
                .iter()
                .any(|connection| connection.transfer.is_some())
    }

    fn accept(&mut self, listener: usize) -> io::Result<()> {
        loop {
            let (listener, role) = &self.listeners[listener];
            match listener.accept() {
                Ok((stream, _)) => {
                    let pipe = Pipe::new(stream)?;
                    self.connections.push(Connection {
                        pipe,
                        role: *role,
                        served: 0,
                        transfer: None,
                    });
                    self.accepted += 1;
                }
                Err(error) if is_transient(&error) => return Ok(()),
                // The client was gone before it was accepted.
                Err(error) if error.kind() == ErrorKind::ConnectionAborted => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn serve(&mut self, connection: &mut Connection) -> io::Result<()> {
        connection.pipe.receive()?;
        match connection.role {
            Role::Echo => {
                while let Some((kind, body)) = take_frame(&mut connection.pipe.input)? {
                    match kind {
                        REQUEST => {
                            let number = number_at(&body, 0)?;
                            connection.served += 1;
                            put_frame(
                                &mut connection.pipe.output,
                                REPLY,
                                &[
                                    &number.to_be_bytes(),
                                    &connection.served.to_be_bytes(),
                                    &body[8..],
                                ],
                            );
                        }
                        COMMAND => {
                            let answer = self.command(&String::from_utf8_lossy(&body));
                            put_frame(&mut connection.pipe.output, ANSWER, &[answer.as_bytes()]);
                        }
                        other => return Err(bad(format!("a frame of kind {other}"))),
                    }
                }
            }
            Role::Greet => connection.pipe.input.clear(),
            Role::Bulk => match &mut connection.transfer {
                Some(transfer) => transfer.check(&mut connection.pipe.input),
                None => {
                    if connection.pipe.input.len() >= BULK_HEADER {
                        let header: Vec<u8> = connection.pipe.input.drain(..BULK_HEADER).collect();
                        let mut transfer =
                            Transfer::new(number_at(&header, 0)?, number_at(&header, 8)?, true);
                        transfer.check(&mut connection.pipe.input);
                        connection.transfer = Some(transfer);
                    }
                }
            },
        }
        connection.pipe.send()
    }

    /// Commands: `info`, `stat PATH`, `memory` (checks every page), `say` (greet), `report` and
    /// `stop` (dial).
    fn command(&mut self, command: &str) -> String {
        let (verb, argument) = command.split_once(' ').unwrap_or((command, ""));
        match verb {
            "info" => format!(
                "{{\"pid\":{},\"accepted\":{},\"open\":{}}}",
                std::process::id(),
                self.accepted,
                self.open
            ),
            "stat" => describe_file(Path::new(argument)),
            "ring" => ring::report(),
            "memory" => self.memory.as_ref().map_or("{}".into(), Memory::check),
            "say" => {
                self.say = true;
                "{\"said\":true}".into()
            }
            "report" => self
                .dialled
                .as_ref()
                .map_or("{}".into(), EchoClient::report),
            "stop" => {
                if let Some(client) = &mut self.dialled {
                    client.finish();
                }
                "{\"stopped\":true}".into()
            }
            _ => format!(
                "{{\"error\":{}}}",
                json_string(&format!("unknown command {verb}"))
            ),
        }
    }
}

/// Memory that is really there (no page of it is zero or like another), part of it written over and
/// over, page after page, round after round. Each page carries its index, and how often it was
/// rewritten, which follows from how many were rewritten in all: a page that was lost, or is as it was
/// a while ago, is found.
struct Memory {
    pages: Vec<Page>,
    per_second: f64,
    due: f64,
    next: usize,
    writes: u64,
}

/// One page as the kernel has it, so that what is rewritten is what becomes dirty.
#[repr(C, align(4096))]
struct Page([u64; 512]);

impl Page {
    /// Index and count of rewritings; then content that nothing can compress.
    fn new(index: u64) -> Page {
        let mut words = [0; 512];
        words[0] = index;
        for at in 2..512u64 {
            words[at as usize] = word(index, at);
        }
        Page(words)
    }

    fn is(&self, index: u64) -> bool {
        self.0[0] == index && (2..512u64).all(|at| self.0[at as usize] == word(index, at))
    }
}

impl Memory {
    fn new(mib: usize, percent: f64) -> Memory {
        let count = mib * 256;
        Memory {
            pages: (0..count as u64).map(Page::new).collect(),
            per_second: count as f64 * percent / 100.0,
            due: 0.0,
            next: 0,
            writes: 0,
        }
    }

    /// Whether it is rewritten at all.
    fn changes(&self) -> bool {
        self.per_second > 0.0
    }

    fn touch(&mut self, elapsed: Duration) {
        // A pause (a move) is not made up for.
        self.due += self.per_second * elapsed.as_secs_f64().min(0.1);
        while self.due >= 1.0 && !self.pages.is_empty() {
            self.due -= 1.0;
            self.pages[self.next].0[1] += 1;
            self.writes += 1;
            self.next = (self.next + 1) % self.pages.len();
        }
    }

    /// Looks at every page: `wrong` are those with another content, `stale` those that miss
    /// rewritings.
    fn check(&self) -> String {
        let rounds = self.writes / (self.pages.len() as u64).max(1);
        let (mut wrong, mut stale, mut writes) = (0, 0, 0);
        for (index, page) in self.pages.iter().enumerate() {
            wrong += u64::from(!page.is(index as u64));
            stale += u64::from(page.0[1] != rounds + u64::from(index < self.next));
            writes += page.0[1];
        }
        format!(
            "{{\"pages\":{},\"wrong\":{wrong},\"stale\":{stale},\"writes\":{},\"writes_lost\":{}}}",
            self.pages.len(),
            self.writes,
            self.writes - writes.min(self.writes)
        )
    }
}

// ------------------------------------------------------------------------------------------------
// Bulk: both directions at once
// ------------------------------------------------------------------------------------------------

/// What a client sends first: bytes each way, bytes per second each way (0: as fast as it goes).
const BULK_HEADER: usize = 16;
/// The server sends its verdict after its data: 1 if all that it received was right, and its sum.
const BULK_VERDICT: u64 = 9;
const TO_SERVER: u64 = 0x7365_7276;
const TO_CLIENT: u64 = 0x636c_6965;

struct Transfer {
    bytes: u64,
    rate: u64,
    send_seed: u64,
    receive_seed: u64,
    is_server: bool,
    started: Instant,
    queued: u64,
    received: u64,
    received_sum: u64,
    wrong_at: Option<u64>,
    /// Verdict sent (server), or received (client).
    verdict: Vec<u8>,
}

impl Transfer {
    fn new(bytes: u64, rate: u64, is_server: bool) -> Transfer {
        let (send_seed, receive_seed) = if is_server {
            (TO_CLIENT, TO_SERVER)
        } else {
            (TO_SERVER, TO_CLIENT)
        };
        Transfer {
            bytes,
            rate,
            send_seed,
            receive_seed,
            is_server,
            started: Instant::now(),
            queued: 0,
            received: 0,
            received_sum: CHECKSUM_START,
            wrong_at: None,
            verdict: Vec::new(),
        }
    }

    /// Checks what arrived, byte by byte, against what must come at this position.
    fn check(&mut self, input: &mut Vec<u8>) {
        let data = input.len().min((self.bytes - self.received) as usize);
        let mut expected = Vec::with_capacity(data);
        stream_bytes(self.receive_seed, self.received, data, &mut expected);
        if self.wrong_at.is_none()
            && let Some(at) = (0..data).find(|&at| input[at] != expected[at])
        {
            self.wrong_at = Some(self.received + at as u64);
        }
        self.received_sum = checksum(self.received_sum, &input[..data]);
        self.received += data as u64;
        if !self.is_server {
            self.verdict.extend_from_slice(&input[data..]);
        }
        input.clear();
    }

    /// Queues what may be sent by now.
    fn fill(&mut self, pipe: &mut Pipe) {
        let allowed = if self.rate == 0 {
            self.bytes
        } else {
            self.bytes
                .min((self.started.elapsed().as_secs_f64() * self.rate as f64) as u64)
        };
        const WINDOW: usize = 1 << 18;
        let room = WINDOW.saturating_sub(pipe.pending());
        let count = (allowed - self.queued.min(allowed)).min(room as u64);
        stream_bytes(
            self.send_seed,
            self.queued,
            count as usize,
            &mut pipe.output,
        );
        self.queued += count;
        if self.is_server
            && self.queued == self.bytes
            && self.received == self.bytes
            && self.verdict.is_empty()
        {
            self.verdict = vec![u8::from(self.wrong_at.is_none())];
            self.verdict
                .extend_from_slice(&self.received_sum.to_be_bytes());
            pipe.output.extend_from_slice(&self.verdict);
        }
    }

    /// The sum that the other side must have found.
    fn sent_sum(&self) -> u64 {
        let mut sum = CHECKSUM_START;
        let mut at = 0;
        let mut chunk = Vec::new();
        while at < self.queued {
            let count = (self.queued - at).min(1 << 20) as usize;
            chunk.clear();
            stream_bytes(self.send_seed, at, count, &mut chunk);
            sum = checksum(sum, &chunk);
            at += count as u64;
        }
        sum
    }
}

fn client_bulk(arguments: &mut Arguments) -> io::Result<()> {
    let peer = arguments.peer()?;
    let bytes = arguments.option_number("--mib")?.unwrap_or(64) << 20;
    let rate = arguments.option_number("--rate-mib")?.unwrap_or(0) << 20;
    let stall = arguments
        .milliseconds("--stall-ms")?
        .unwrap_or(Duration::from_secs(60));
    let mut pipe = Pipe::new(connect(peer)?)?;
    pipe.output.extend_from_slice(&bytes.to_be_bytes());
    pipe.output.extend_from_slice(&rate.to_be_bytes());
    let mut transfer = Transfer::new(bytes, rate, false);
    let mut gap = Gap::new();
    let mut failure = None;
    let mut announced = false;
    while !stopped()
        && (transfer.received < bytes || (transfer.verdict.len() as u64) < BULK_VERDICT)
    {
        transfer.fill(&mut pipe);
        let step = pipe.send().and_then(|()| {
            let mut fds = [pipe.interest()];
            poll(&mut fds, TICK)?;
            if fds[0].revents & !POLLOUT != 0 && pipe.receive()? > 0 {
                gap.reply();
                transfer.check(&mut pipe.input);
            }
            Ok(())
        });
        if !announced && transfer.received > 0 {
            announced = true;
            eprintln!("ready");
        }
        if let Err(error) = step {
            failure = Some(error.to_string());
            break;
        }
        if gap.since_last() > stall {
            failure = Some(format!("nothing for {} ms", stall.as_millis()));
            break;
        }
    }
    let verdict = &transfer.verdict;
    let sent_right =
        verdict.first() == Some(&1) && number_at(verdict, 1).ok() == Some(transfer.sent_sum());
    println!(
        "{{\"bytes_each_way\":{bytes},\"sent\":{},\"received\":{},\"sent_right\":{sent_right},\
         \"received_right\":{},\"wrong_at\":{},\"seconds\":{:.3},{},\"failure\":{}}}",
        transfer.queued,
        transfer.received,
        transfer.wrong_at.is_none() && transfer.received == bytes,
        transfer.wrong_at.map_or("null".into(), |at| at.to_string()),
        transfer.started.elapsed().as_secs_f64(),
        gap.json(),
        failure.map_or("null".into(), |text| json_string(&text)),
    );
    Ok(())
}

// ------------------------------------------------------------------------------------------------
// Gaps
// ------------------------------------------------------------------------------------------------

fn realtime_ns() -> u128 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_nanos())
}

/// The longest gap: the longest time between two successive replies (or lines, or pieces of data)
/// on one connection. It has its place in real time (CLOCK_REALTIME, ns), to be laid beside the
/// phases of a migration.
#[derive(Clone)]
struct Gap {
    last: Instant,
    last_ns: u128,
    longest: Duration,
    from_ns: u128,
    to_ns: u128,
}

/// Gaps from here on go to the log.
const WORTH_LOGGING: Duration = Duration::from_millis(10);

impl Gap {
    fn new() -> Gap {
        Gap {
            last: Instant::now(),
            last_ns: realtime_ns(),
            longest: Duration::ZERO,
            from_ns: 0,
            to_ns: 0,
        }
    }

    /// Something arrived. Returns the gap before it.
    fn reply(&mut self) -> Duration {
        self.reply_at(Instant::now(), realtime_ns())
    }

    /// The same for what arrived at a time that is known.
    fn reply_at(&mut self, now: Instant, now_ns: u128) -> Duration {
        // By the real time: the monotonic clock of a restored process goes on from where it was
        // dumped, as if no time had passed.
        let nanoseconds = now_ns.saturating_sub(self.last_ns);
        let gap = Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX));
        if gap > self.longest {
            (self.longest, self.from_ns, self.to_ns) = (gap, self.last_ns, now_ns);
        }
        (self.last, self.last_ns) = (now, now_ns);
        gap
    }

    fn since_last(&self) -> Duration {
        self.last.elapsed()
    }

    fn json(&self) -> String {
        format!(
            "\"longest_gap_ms\":{:.3},\"gap_from_ns\":{},\"gap_to_ns\":{}",
            self.longest.as_secs_f64() * 1000.0,
            self.from_ns,
            self.to_ns
        )
    }
}

/// When a client is to stop.
struct End {
    started: Instant,
    seconds: Option<Duration>,
    file: Option<String>,
    looked: Instant,
}

impl End {
    fn from(arguments: &Arguments) -> io::Result<End> {
        Ok(End {
            started: Instant::now(),
            seconds: arguments
                .option_number("--seconds")?
                .map(Duration::from_secs),
            file: arguments.option("--until-file").map(String::from),
            looked: Instant::now(),
        })
    }

    /// The seconds count from now.
    fn restart(&mut self) {
        self.started = Instant::now();
    }

    fn reached(&mut self) -> bool {
        if stopped()
            || NEXT.swap(false, Ordering::Relaxed)
            || self
                .seconds
                .is_some_and(|limit| self.started.elapsed() >= limit)
        {
            return true;
        }
        if let Some(file) = &self.file
            && self.looked.elapsed() >= TICK
        {
            self.looked = Instant::now();
            return Path::new(file).exists();
        }
        false
    }
}

// ------------------------------------------------------------------------------------------------
// Echo client
// ------------------------------------------------------------------------------------------------

struct EchoOptions {
    every: Duration,
    connections: usize,
    /// Connections that send one request at the start and one at the end, and nothing between.
    idle: usize,
    payload: usize,
    /// How long replies may take after the end before they count as unanswered.
    grace: Duration,
    log: Option<fs::File>,
}

impl EchoOptions {
    fn from(arguments: &Arguments) -> io::Result<EchoOptions> {
        Ok(EchoOptions {
            every: arguments
                .milliseconds("--every-ms")?
                .unwrap_or(Duration::from_millis(2)),
            connections: arguments.option_number("--connections")?.unwrap_or(1) as usize,
            idle: arguments.option_number("--idle")?.unwrap_or(0) as usize,
            payload: arguments.option_number("--payload")?.unwrap_or(64) as usize,
            grace: arguments
                .milliseconds("--grace-ms")?
                .unwrap_or(Duration::from_secs(20)),
            log: arguments
                .option("--log")
                .map(fs::File::create)
                .transpose()?,
        })
    }
}

struct EchoConnection {
    pipe: Pipe,
    idle: bool,
    alive: bool,
    requests: u64,
    replies: u64,
    wrong: u64,
    due: Instant,
    asked: Instant,
    gap: Gap,
    local: SocketAddr,
}

impl EchoConnection {
    fn waiting(&self) -> bool {
        self.requests > self.replies
    }
}

/// Sends numbered requests over connections that it never opens anew, one outstanding request on
/// each, and checks every reply.
struct EchoClient {
    peer: SocketAddr,
    options: EchoOptions,
    connections: Vec<EchoConnection>,
    resets: u64,
    first_error: Option<String>,
    rtts_us: Vec<u32>,
    finishing: Option<Instant>,
}

/// Round-trip times kept for the median.
const MOST_RTTS: usize = 4_000_000;

impl EchoClient {
    fn connect(peer: SocketAddr, options: EchoOptions) -> io::Result<EchoClient> {
        let now = Instant::now();
        let mut connections = Vec::new();
        for index in 0..options.connections + options.idle {
            let stream = connect(peer)?;
            let local = stream.local_addr()?;
            connections.push(EchoConnection {
                pipe: Pipe::new(stream)?,
                idle: index >= options.connections,
                alive: true,
                requests: 0,
                replies: 0,
                wrong: 0,
                due: now,
                asked: now,
                gap: Gap::new(),
                local,
            });
        }
        Ok(EchoClient {
            peer,
            options,
            connections,
            resets: 0,
            first_error: None,
            rtts_us: Vec::new(),
            finishing: None,
        })
    }

    fn interests(&self) -> Vec<PollFd> {
        self.connections
            .iter()
            .filter(|c| c.alive)
            .map(|c| c.pipe.interest())
            .collect()
    }

    /// How long nothing needs to be done unless something arrives.
    fn until_next(&self) -> Duration {
        let now = Instant::now();
        self.connections
            .iter()
            .filter(|c| c.alive && !c.waiting() && !(c.idle && c.requests > 0))
            .map(|c| c.due.saturating_duration_since(now))
            .min()
            .unwrap_or(TICK)
            .min(TICK)
    }

    /// `fds`: what [`interests`](Self::interests) gave, after the poll.
    fn step(&mut self, fds: &[PollFd]) -> io::Result<()> {
        let finishing = self.finishing.is_some();
        let payload = self.options.payload;
        let mut fds = fds.iter();
        for (index, connection) in self.connections.iter_mut().enumerate() {
            if !connection.alive {
                continue;
            }
            let ready = fds.next().is_some_and(|fd| fd.revents & !POLLOUT != 0);
            let mut step = || -> io::Result<()> {
                if ready && connection.pipe.receive()? > 0 {
                    while let Some((kind, body)) = take_frame(&mut connection.pipe.input)? {
                        // Numbers begin at 0, the count of those served at 1.
                        let right = kind == REPLY
                            && connection.waiting()
                            && number_at(&body, 0)? == connection.replies
                            && number_at(&body, 8)? == connection.replies + 1
                            && body[16..] == echo_payload(index, connection.replies, payload);
                        connection.wrong += u64::from(!right);
                        connection.replies += 1;
                        let gap = connection.gap.reply();
                        let now = Instant::now();
                        if self.rtts_us.len() < MOST_RTTS {
                            self.rtts_us
                                .push((now - connection.asked).as_micros() as u32);
                        }
                        if gap >= WORTH_LOGGING
                            && !connection.idle
                            && let Some(log) = &mut self.options.log
                        {
                            let to = realtime_ns();
                            writeln!(
                                log,
                                "{{\"connection\":{index},\"gap_ms\":{:.3},\"from_ns\":{},\"to_ns\":{to}}}",
                                gap.as_secs_f64() * 1000.0,
                                to - gap.as_nanos()
                            )?;
                        }
                        connection.due = (connection.due + self.options.every).max(now);
                    }
                }
                let wanted = if connection.idle {
                    connection.requests == 0
                } else {
                    !finishing
                };
                if !connection.waiting() && wanted && Instant::now() >= connection.due {
                    connection.ask(index, payload);
                }
                connection.pipe.send()
            };
            if let Err(error) = step() {
                connection.alive = false;
                self.resets += 1;
                self.first_error.get_or_insert_with(|| error.to_string());
            }
        }
        Ok(())
    }

    /// No more requests but one last on each connection, so that idle ones are heard of too.
    fn finish(&mut self) {
        if self.finishing.is_none() {
            self.finishing = Some(Instant::now());
            let payload = self.options.payload;
            for (index, connection) in self.connections.iter_mut().enumerate() {
                if connection.alive && !connection.waiting() {
                    connection.ask(index, payload);
                    // A failure is seen by the next step.
                    let _ = connection.pipe.send();
                }
            }
        }
    }

    fn finished(&self) -> bool {
        self.finishing.is_some_and(|since| {
            since.elapsed() > self.options.grace
                || !self.connections.iter().any(|c| c.alive && c.waiting())
        })
    }

    fn answered(&self) -> bool {
        self.connections.iter().all(|c| c.replies > 0 || !c.alive)
    }

    fn report(&self) -> String {
        let total =
            |count: fn(&EchoConnection) -> u64| self.connections.iter().map(count).sum::<u64>();
        // Idle connections have no gaps worth the name.
        let gap = self
            .connections
            .iter()
            .filter(|c| !c.idle)
            .map(|c| &c.gap)
            .max_by_key(|gap| gap.longest)
            .cloned()
            .unwrap_or_else(Gap::new);
        let mut rtts = self.rtts_us.clone();
        rtts.sort_unstable();
        let wrong = total(|c| c.wrong);
        let unanswered = total(|c| c.requests - c.replies.min(c.requests));
        let same = self.connections.iter().all(|c| {
            c.alive
                && c.pipe
                    .stream
                    .local_addr()
                    .is_ok_and(|address| address == c.local)
        });
        format!(
            "{{\"connected\":{},\"idle\":{},\"requests\":{},\"replies\":{},\"wrong\":{wrong},\
             \"unanswered\":{unanswered},\"resets\":{},\"reconnects\":0,{},\"median_rtt_us\":{},\
             \"p99_rtt_us\":{},\"same_socket\":{same},\"local\":\"{}\",\"peer\":\"{}\",\"error\":{}}}",
            self.connections.len(),
            self.options.idle,
            total(|c| c.requests),
            total(|c| c.replies),
            self.resets,
            gap.json(),
            rtts.get(rtts.len() / 2).copied().unwrap_or(0),
            rtts.get(rtts.len() * 99 / 100).copied().unwrap_or(0),
            self.connections
                .first()
                .map_or(String::new(), |c| c.local.to_string()),
            self.peer,
            self.first_error
                .as_deref()
                .map_or("null".into(), json_string),
        )
    }
}

impl EchoConnection {
    fn ask(&mut self, index: usize, payload: usize) {
        let payload = echo_payload(index, self.requests, payload);
        put_frame(
            &mut self.pipe.output,
            REQUEST,
            &[&self.requests.to_be_bytes(), &payload],
        );
        self.requests += 1;
        self.asked = Instant::now();
        self.due = self.due.max(self.asked);
    }
}

/// Different for every connection and request: a reply from anywhere else is noticed.
fn echo_payload(connection: usize, number: u64, length: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(length);
    stream_bytes(
        connection as u64 ^ number.rotate_left(32),
        0,
        length,
        &mut out,
    );
    out
}

fn client_echo(arguments: &mut Arguments) -> io::Result<()> {
    let peer = arguments.peer()?;
    let options = EchoOptions::from(arguments)?;
    let mut client = EchoClient::connect(peer, options)?;
    let mut end = End::from(arguments)?;
    let mut announced = false;
    while !client.finished() {
        let mut fds = client.interests();
        if fds.is_empty() {
            break;
        }
        poll(&mut fds, client.until_next())?;
        client.step(&fds)?;
        if !announced && client.answered() {
            announced = true;
            eprintln!("ready");
        }
        if end.reached() {
            client.finish();
        }
    }
    println!("{}", client.report());
    Ok(())
}

fn client_greet(arguments: &mut Arguments) -> io::Result<()> {
    let peer = arguments.peer()?;
    let lines_wanted = arguments.option_number("--lines")?;
    let mut end = End::from(arguments)?;
    // Nothing is ever sent on it.
    let mut pipe = Pipe::new(connect(peer)?)?;
    let mut gap = Gap::new();
    let (mut lines, mut wrong, mut failure) = (0u64, 0u64, None);
    eprintln!("ready");
    while !end.reached() && lines_wanted.is_none_or(|wanted| lines < wanted) {
        let mut fds = [pipe.interest()];
        poll(&mut fds, TICK)?;
        if fds[0].revents == 0 {
            continue;
        }
        if let Err(error) = pipe.receive() {
            failure = Some(error.to_string());
            break;
        }
        while let Some(length) = pipe.input.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = pipe.input.drain(..=length).collect();
            wrong += u64::from(line != format!("line {lines}\n").as_bytes());
            lines += 1;
            gap.reply();
        }
    }
    println!(
        "{{\"connected\":1,\"lines\":{lines},\"wrong\":{wrong},\"resets\":{},{},\"error\":{}}}",
        u64::from(failure.is_some()),
        gap.json(),
        failure.map_or("null".into(), |text| json_string(&text))
    );
    Ok(())
}
