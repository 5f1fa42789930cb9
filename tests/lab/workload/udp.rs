//! Numbered datagrams: who sends them at an exact rate, who counts them, who sends them back.
//!
//! Everything goes through `sendmmsg` and `recvmmsg`: at 100,000 datagrams a second a system call
//! for each would make this program the limit, and not the path that it is to measure.
//!
//! A datagram is `magic: u32`, `session: u32`, `number: u64`, padding. A query has another magic.
//! The socket of a server in a container has the default receive buffer, as programs have it; only
//! the client's is larger, since what the client loses is not what is measured.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::{Arguments, End, Gap, TICK, is_transient, number_at, realtime_ns, stopped};

const NUMBERED: u32 = 0x6c6d_7531;
const QUERY: u32 = 0x6c6d_7532;
/// The least that a datagram has.
const HEADER: usize = 16;

/// Counts numbered datagrams. Bounded: beyond this number they are not told apart.
const MOST_NUMBERS: u64 = 1 << 28;

/// How many datagrams one system call takes or gives.
const BATCH: usize = 64;
/// No datagram is longer.
const LONGEST: usize = 65536;
/// A sender that is faster than one datagram in this time sends several at once.
const LEAST_PERIOD: Duration = Duration::from_micros(500);
/// The client's receive buffer, in bytes.
const CLIENT_BUFFER: i32 = 32 << 20;
/// How long a client waits for what is still under way, from the last datagram that came.
const LATEST: Duration = Duration::from_secs(2);
/// How long it goes on asking what was counted.
const ASKING: Duration = Duration::from_secs(10);

// ------------------------------------------------------------------------------------------------
// Many datagrams in one system call
// ------------------------------------------------------------------------------------------------

/// `struct iovec`.
#[repr(C)]
struct Part {
    base: *mut u8,
    length: usize,
}

/// Room for any socket address: `struct sockaddr_storage`.
#[repr(C, align(8))]
#[derive(Clone, Copy)]
struct Name([u8; 128]);

/// `struct msghdr` and the length that `struct mmsghdr` adds to it, as 64-bit Linux has them.
#[repr(C)]
struct Message {
    name: *mut Name,
    name_length: u32,
    parts: *mut Part,
    part_count: usize,
    control: *mut u8,
    control_length: usize,
    flags: i32,
    _end_of_header: u32,
    length: u32,
    _end: u32,
}

const SOL_SOCKET: i32 = 1;
const SO_RCVBUF: i32 = 8;
const SO_RCVBUFFORCE: i32 = 33;
/// `MSG_WAITFORONE`: wait for the first only.
const WAIT_FOR_ONE: i32 = 0x10000;

unsafe extern "C" {
    fn recvmmsg(fd: i32, messages: *mut Message, count: u32, flags: i32, timeout: *const u8)
    -> i32;
    fn sendmmsg(fd: i32, messages: *mut Message, count: u32, flags: i32) -> i32;
    fn setsockopt(fd: i32, level: i32, name: i32, value: *const i32, length: u32) -> i32;
}

/// Room for the datagrams of one system call.
///
/// The pointers in it point into its own vectors, which are never grown, so they stay right when it
/// is moved.
struct Batch {
    messages: Vec<Message>,
    parts: Vec<Part>,
    _names: Vec<Name>,
    bytes: Vec<u8>,
    /// How long each datagram may be.
    slot: usize,
}

impl Batch {
    fn new(slot: usize) -> Batch {
        let mut bytes = vec![0; BATCH * slot];
        let mut names = vec![Name([0; 128]); BATCH];
        let mut parts: Vec<Part> = (0..BATCH)
            .map(|at| Part {
                base: bytes[at * slot..].as_mut_ptr(),
                length: slot,
            })
            .collect();
        let messages = (0..BATCH)
            .map(|at| Message {
                name: &mut names[at],
                name_length: size_of::<Name>() as u32,
                parts: &mut parts[at],
                part_count: 1,
                control: std::ptr::null_mut(),
                control_length: 0,
                flags: 0,
                _end_of_header: 0,
                length: 0,
                _end: 0,
            })
            .collect();
        Batch {
            messages,
            parts,
            _names: names,
            bytes,
            slot,
        }
    }

    /// For a connected socket: nothing has a name.
    fn connected(slot: usize) -> Batch {
        let mut batch = Batch::new(slot);
        for message in &mut batch.messages {
            (message.name, message.name_length) = (std::ptr::null_mut(), 0);
        }
        batch
    }

    fn slot(&mut self, at: usize) -> &mut [u8] {
        &mut self.bytes[at * self.slot..][..self.slot]
    }

    fn datagram(&self, at: usize) -> &[u8] {
        let length = (self.messages[at].length as usize).min(self.slot);
        &self.bytes[at * self.slot..][..length]
    }

    /// Waits for one datagram, as long as the socket's time-out is, and takes what else is there.
    fn receive(&mut self, socket: &UdpSocket) -> io::Result<usize> {
        for message in &mut self.messages {
            if !message.name.is_null() {
                message.name_length = size_of::<Name>() as u32;
            }
        }
        let (messages, none) = (self.messages.as_mut_ptr(), std::ptr::null());
        // SAFETY: every message points to a name and a slot of its own with the lengths it says.
        let count = unsafe {
            recvmmsg(
                socket.as_raw_fd(),
                messages,
                BATCH as u32,
                WAIT_FOR_ONE,
                none,
            )
        };
        usize::try_from(count).map_err(|_| io::Error::last_os_error())
    }

    /// Sends the datagrams from `first` to before `end`; returns how many it was.
    fn send(&mut self, socket: &UdpSocket, first: usize, end: usize) -> io::Result<usize> {
        let messages = &mut self.messages[first..end];
        // SAFETY: as above; the count is that of the slice.
        let count = unsafe {
            sendmmsg(
                socket.as_raw_fd(),
                messages.as_mut_ptr(),
                messages.len() as u32,
                0,
            )
        };
        usize::try_from(count).map_err(|_| io::Error::last_os_error())
    }

    /// Sends the first `count` datagrams back to where they came from.
    fn send_back(&mut self, socket: &UdpSocket, count: usize) {
        for (part, message) in self.parts.iter_mut().zip(&self.messages).take(count) {
            part.length = message.length as usize;
        }
        let mut done = 0;
        while done < count {
            match self.send(socket, done, count) {
                Ok(sent) => done += sent,
                Err(error) if is_transient(&error) => {}
                // Whatever is wrong with this one, the others have a chance.
                Err(_) => done += 1,
            }
        }
        for part in &mut self.parts[..count] {
            part.length = self.slot;
        }
    }
}

/// Makes room for what arrives while the client waits for a processor.
fn enlarge_buffer(socket: &UdpSocket) {
    let size = CLIENT_BUFFER;
    // The first goes beyond `net.core.rmem_max`, and wants a privilege.
    for option in [SO_RCVBUFFORCE, SO_RCVBUF] {
        let (fd, value) = (socket.as_raw_fd(), &raw const size);
        // SAFETY: the value is an int, as these options have it, and has the length given.
        if unsafe { setsockopt(fd, SOL_SOCKET, option, value, size_of::<i32>() as u32) } == 0 {
            return;
        }
    }
}

fn parse(bytes: &[u8]) -> Option<(u32, u32, u64)> {
    let magic = u32::from_be_bytes(bytes.get(..4)?.try_into().ok()?);
    let session = u32::from_be_bytes(bytes.get(4..8)?.try_into().ok()?);
    Some((magic, session, number_at(bytes, 8).ok()?))
}

fn write(to: &mut [u8], magic: u32, session: u32, number: u64) {
    to[..4].copy_from_slice(&magic.to_be_bytes());
    to[4..8].copy_from_slice(&session.to_be_bytes());
    to[8..HEADER].copy_from_slice(&number.to_be_bytes());
}

// ------------------------------------------------------------------------------------------------
// Counting
// ------------------------------------------------------------------------------------------------

struct Arrivals {
    seen: Vec<u64>,
    received: u64,
    duplicated: u64,
    reordered: u64,
    highest: Option<u64>,
    gap: Gap,
}

impl Arrivals {
    fn new() -> Arrivals {
        Arrivals {
            seen: Vec::new(),
            received: 0,
            duplicated: 0,
            reordered: 0,
            highest: None,
            gap: Gap::new(),
        }
    }

    fn arrived(&mut self, number: u64, now: Instant, now_ns: u128) {
        if self.received == 0 {
            self.gap = Gap::new();
        } else {
            self.gap.reply_at(now, now_ns);
        }
        self.received += 1;
        let number = number.min(MOST_NUMBERS);
        let (at, bit) = ((number / 64) as usize, 1 << (number % 64));
        if at >= self.seen.len() {
            self.seen.resize(at + 1, 0);
        }
        if self.seen[at] & bit != 0 {
            self.duplicated += 1;
            return;
        }
        self.seen[at] |= bit;
        // Late: one with a higher number was here before it.
        self.reordered += u64::from(self.highest.is_some_and(|highest| number < highest));
        self.highest = self.highest.max(Some(number));
    }

    fn distinct(&self) -> u64 {
        self.received - self.duplicated
    }

    /// The first of those that did not come though later ones did.
    fn missing(&self) -> Vec<u64> {
        let there = |number: &u64| {
            let word = self.seen.get((number / 64) as usize);
            word.is_some_and(|word| word & (1 << (number % 64)) != 0)
        };
        let all = 0..self.highest.unwrap_or(0);
        all.filter(|number| !there(number)).take(8).collect()
    }

    /// Without the braces. `sent` is known to the sender only.
    fn json(&self) -> String {
        format!(
            "\"received\":{},\"distinct\":{},\"duplicated\":{},\"reordered\":{},\"highest\":{},\
             \"missing\":{:?},{}",
            self.received,
            self.distinct(),
            self.duplicated,
            self.reordered,
            self.highest
                .map_or("null".into(), |number| number.to_string()),
            self.missing(),
            self.gap.json()
        )
    }
}

// ------------------------------------------------------------------------------------------------
// Servers
// ------------------------------------------------------------------------------------------------

fn server_socket(address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind(address)?;
    // So that a signal is noticed.
    socket.set_read_timeout(Some(Duration::from_millis(200)))?;
    Ok(socket)
}

/// What a server got, until it is told to stop. Interruptions are not worth a word: checkpoint and
/// restore bring some.
fn serve(
    address: SocketAddr,
    mut handle: impl FnMut(&UdpSocket, &mut Batch, usize),
) -> io::Result<()> {
    let socket = server_socket(address)?;
    let mut batch = Batch::new(LONGEST);
    while !stopped() {
        match batch.receive(&socket) {
            Ok(count) => handle(&socket, &mut batch, count),
            Err(error) if is_transient(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

pub fn echo(address: SocketAddr) -> io::Result<()> {
    serve(address, |socket, batch, count| {
        batch.send_back(socket, count);
    })
}

pub fn count(address: SocketAddr) -> io::Result<()> {
    let mut sessions: HashMap<u32, Arrivals> = HashMap::new();
    serve(address, |socket, batch, count| {
        let (now, now_ns) = (Instant::now(), realtime_ns());
        for at in 0..count {
            match parse(batch.datagram(at)) {
                Some((NUMBERED, session, number)) => sessions
                    .entry(session)
                    .or_insert_with(Arrivals::new)
                    .arrived(number, now, now_ns),
                Some((QUERY, session, _)) => {
                    let answer = match sessions.get(&session) {
                        Some(arrivals) => arrivals.json(),
                        None => Arrivals::new().json(),
                    };
                    batch.slot(at)[..answer.len()].copy_from_slice(answer.as_bytes());
                    batch.messages[at].length = answer.len() as u32;
                    // Only this one is sent.
                    batch.parts[at].length = answer.len();
                    let _ = batch.send(socket, at, at + 1);
                    batch.parts[at].length = batch.slot;
                }
                _ => {}
            }
        }
    })
}

// ------------------------------------------------------------------------------------------------
// The client
// ------------------------------------------------------------------------------------------------

fn client_socket(peer: SocketAddr) -> io::Result<UdpSocket> {
    let unspecified: IpAddr = if peer.is_ipv4() {
        Ipv4Addr::UNSPECIFIED.into()
    } else {
        Ipv6Addr::UNSPECIFIED.into()
    };
    let socket = UdpSocket::bind((unspecified, 0))?;
    socket.connect(peer)?;
    Ok(socket)
}

/// What the receiving thread of a client has got.
struct Inbox {
    session: AtomicU32,
    done: AtomicBool,
    got: Mutex<Got>,
}

struct Got {
    arrivals: Arrivals,
    /// The last answer to a query.
    answer: Option<String>,
    /// ICMP errors about datagrams sent earlier.
    refused: u64,
}

impl Inbox {
    fn got(&self) -> MutexGuard<'_, Got> {
        self.got.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins to count anew.
    fn begin(&self, session: u32) {
        let mut got = self.got();
        self.session.store(session, Ordering::Relaxed);
        *got = Got {
            arrivals: Arrivals::new(),
            answer: None,
            refused: 0,
        };
    }

    fn fill(&self, socket: &UdpSocket) {
        let mut batch = Batch::connected(LONGEST);
        while !self.done.load(Ordering::Relaxed) {
            let received = batch.receive(socket);
            let (now, now_ns) = (Instant::now(), realtime_ns());
            let mut got = self.got();
            let session = self.session.load(Ordering::Relaxed);
            match received {
                Ok(count) => {
                    for at in 0..count {
                        let datagram = batch.datagram(at);
                        match parse(datagram) {
                            Some((NUMBERED, from, number)) if from == session => {
                                got.arrivals.arrived(number, now, now_ns);
                            }
                            // Of an earlier run: too late.
                            Some((NUMBERED, ..)) => {}
                            _ => got.answer = Some(String::from_utf8_lossy(datagram).into_owned()),
                        }
                    }
                }
                Err(error) => got.refused += u64::from(!is_transient(&error)),
            }
        }
    }
}

/// Sends at an exact rate: `due` grows with the clock, and what a wait for a processor has kept from
/// being sent is made up for, at no more than twice the rate. A larger burst would overflow the
/// receiver's buffer, and the loss would be this program's.
struct Sender<'a> {
    socket: &'a UdpSocket,
    batch: Batch,
    rate: u64,
    sent: u64,
    failed: u64,
    refused: u64,
    /// How far it was behind at the most.
    behind: Duration,
}

impl Sender<'_> {
    fn run(&mut self, session: u32, end: &mut End, mut each: impl FnMut()) {
        let rate = self.rate as f64;
        let period = LEAST_PERIOD.max(Duration::from_secs_f64(1.0 / rate));
        let burst = 2 * (rate * period.as_secs_f64()).ceil() as u64;
        (self.sent, self.failed, self.refused) = (0, 0, 0);
        self.behind = Duration::ZERO;
        let started = Instant::now();
        let mut next = started;
        while !end.reached() {
            let due = (started.elapsed().as_secs_f64() * rate) as u64 + 1;
            let missing = due.saturating_sub(self.sent);
            let behind = Duration::from_secs_f64(missing.saturating_sub(1) as f64 / rate);
            self.behind = self.behind.max(behind);
            self.send(session, missing.min(burst));
            each();
            next += period;
            let now = Instant::now();
            match next.checked_duration_since(now) {
                Some(wait) => std::thread::sleep(wait),
                // What was missed is made up for at the ticks to come, not all at once.
                None => next = now,
            }
        }
    }

    fn send(&mut self, session: u32, mut count: u64) {
        /// After so many errors in a row a datagram is given up.
        const TRIES: u32 = 10;
        while count > 0 {
            let now = count.min(BATCH as u64) as usize;
            for at in 0..now {
                let number = self.sent + at as u64;
                write(self.batch.slot(at), NUMBERED, session, number);
            }
            let (mut done, mut errors) = (0, 0);
            while done < now {
                match self.batch.send(self.socket, done, now) {
                    Ok(sent) => (done, errors) = (done + sent, 0),
                    // ENOBUFS, the local queue is full; or it was interrupted: not the network's fault.
                    Err(error) if is_transient(&error) || error.raw_os_error() == Some(105) => {}
                    // As a rule about an earlier one (refused, unreachable); this one was not sent.
                    Err(_) if errors < TRIES => {
                        (errors, self.refused) = (errors + 1, self.refused + 1)
                    }
                    Err(_) => (done, errors, self.failed) = (done + 1, 0, self.failed + 1),
                }
            }
            self.sent += now as u64;
            count -= now as u64;
        }
    }
}

/// The number behind a key in the JSON of [`Arrivals`].
fn field(json: &str, key: &str) -> Option<u64> {
    let (_, rest) = json.split_once(&format!("\"{key}\":"))?;
    rest.split([',', '}']).next()?.parse().ok()
}

/// Waits for what is still under way, and returns what was counted, and whether that is known.
fn settle(socket: &UdpSocket, inbox: &Inbox, sent: u64, echo: bool) -> (String, bool) {
    let started = Instant::now();
    if echo {
        let (mut last, mut since) = (0, started);
        loop {
            let got = inbox.got();
            if got.arrivals.distinct() == sent || since.elapsed() > LATEST {
                return (got.arrivals.json(), true);
            }
            if got.arrivals.received != last {
                (last, since) = (got.arrivals.received, Instant::now());
            }
            drop(got);
            std::thread::sleep(TICK);
        }
    }
    let mut query = [0; HEADER];
    let session = inbox.session.load(Ordering::Relaxed);
    write(&mut query, QUERY, session, 0);
    // Until all is there, or nothing more has come for a while.
    let (mut known, mut since) = (None, started);
    loop {
        let _ = socket.send(&query);
        std::thread::sleep(Duration::from_millis(200));
        if let Some(answer) = inbox.got().answer.take() {
            let complete = field(&answer, "distinct") == Some(sent);
            let received = field(&answer, "received");
            let news = known.as_deref().and_then(|text| field(text, "received")) != received;
            known = Some(answer);
            if news {
                since = Instant::now();
            }
            if complete || since.elapsed() > LATEST {
                break;
            }
        } else if started.elapsed() > ASKING {
            break;
        }
    }
    match known {
        Some(answer) => (answer, true),
        None => (Arrivals::new().json(), false),
    }
}

/// Sends from one socket: one run after the other, each of them counted by itself.
pub fn client(arguments: &mut Arguments) -> io::Result<()> {
    let peer = arguments.peer()?;
    let rate = arguments.option_number("--rate")?.unwrap_or(1000).max(1);
    let payload = arguments
        .option_number("--payload")?
        .unwrap_or(HEADER as u64);
    let runs = arguments.option_number("--runs")?.unwrap_or(1);
    let echo = arguments.option("--mode") != Some("oneway");
    let mut end = End::from(arguments)?;
    let socket = client_socket(peer)?;
    enlarge_buffer(&socket);
    // So that the receiving thread notices the end.
    socket.set_read_timeout(Some(Duration::from_millis(100)))?;
    let inbox = Inbox {
        session: AtomicU32::new(0),
        done: AtomicBool::new(false),
        got: Mutex::new(Got {
            arrivals: Arrivals::new(),
            answer: None,
            refused: 0,
        }),
    };
    let mut sender = Sender {
        socket: &socket,
        batch: Batch::connected((payload as usize).clamp(HEADER, LONGEST)),
        rate,
        sent: 0,
        failed: 0,
        refused: 0,
        behind: Duration::ZERO,
    };
    let first = std::process::id() ^ realtime_ns() as u32;
    std::thread::scope(|scope| {
        scope.spawn(|| inbox.fill(&socket));
        let mut announced = false;
        for run in 0..runs {
            let session = first.wrapping_add(run as u32);
            inbox.begin(session);
            end.restart();
            let begin = realtime_ns();
            sender.run(session, &mut end, || {
                if !announced && (!echo || inbox.got().arrivals.received > 0) {
                    announced = true;
                    eprintln!("ready");
                }
            });
            let until = realtime_ns();
            let (counted, answered) = settle(&socket, &inbox, sender.sent, echo);
            let distinct = field(&counted, "distinct").unwrap_or(0);
            println!(
                "{{\"run\":{run},\"rate_pps\":{rate},\"sent\":{},\"failed\":{},\"refused\":{},\
                 \"behind_ms\":{:.3},\"from_ns\":{begin},\"to_ns\":{until},\"lost\":{},\
                 \"answered\":{answered},{counted}}}",
                sender.sent,
                sender.failed,
                sender.refused + inbox.got().refused,
                sender.behind.as_secs_f64() * 1e3,
                sender.sent.saturating_sub(distinct),
            );
            if stopped() {
                break;
            }
        }
        inbox.done.store(true, Ordering::Relaxed);
    });
    Ok(())
}

// ------------------------------------------------------------------------------------------------
// Many flows
// ------------------------------------------------------------------------------------------------

/// Sends a datagram from each socket until each was answered; returns how many were.
fn exchange(sockets: &[UdpSocket], session: u32, bound: Duration) -> usize {
    /// No more at once than a receive buffer of the default size holds.
    const AT_ONCE: usize = 100;
    let started = Instant::now();
    let mut answered = vec![false; sockets.len()];
    let mut datagram = [0; HEADER];
    let mut buffer = [0; HEADER];
    loop {
        let waiting: Vec<usize> = (0..sockets.len()).filter(|at| !answered[*at]).collect();
        if waiting.is_empty() || started.elapsed() > bound {
            return sockets.len() - waiting.len();
        }
        for some in waiting.chunks(AT_ONCE) {
            for &at in some {
                write(&mut datagram, NUMBERED, session, at as u64);
                let _ = sockets[at].send(&datagram);
            }
            std::thread::sleep(Duration::from_millis(2));
            for &at in some {
                while let Ok(length) = sockets[at].recv(&mut buffer) {
                    answered[at] |=
                        parse(&buffer[..length]) == Some((NUMBERED, session, at as u64));
                }
            }
        }
        // What was late.
        std::thread::sleep(TICK);
        for at in waiting {
            while let Ok(length) = sockets[at].recv(&mut buffer) {
                answered[at] |= parse(&buffer[..length]) == Some((NUMBERED, session, at as u64));
            }
        }
    }
}

/// Many flows to one server, each with a datagram at the beginning and one at the end.
pub fn client_flows(arguments: &mut Arguments) -> io::Result<()> {
    const BOUND: Duration = Duration::from_secs(20);
    let peer = arguments.peer()?;
    let flows = arguments.option_number("--flows")?.unwrap_or(100);
    let mut end = End::from(arguments)?;
    let mut sockets = Vec::new();
    for _ in 0..flows {
        let socket = client_socket(peer)?;
        socket.set_nonblocking(true)?;
        sockets.push(socket);
    }
    let session = std::process::id() ^ realtime_ns() as u32;
    let before = exchange(&sockets, session, BOUND);
    eprintln!("ready");
    while !end.reached() {
        std::thread::sleep(TICK);
    }
    let after = exchange(&sockets, session.wrapping_add(1), BOUND);
    println!("{{\"flows\":{flows},\"answered_before\":{before},\"answered_after\":{after}}}");
    Ok(())
}
