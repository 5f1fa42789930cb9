fn main() { 
    use std::io::*;
    let l = std::net::TcpListener::bind("0.0.0.0:7000").unwrap();
    for s in l.incoming() { let mut s = s.unwrap(); std::thread::spawn(move || { let mut b=[0;4096]; loop { let n = s.read(&mut b).unwrap_or(0); if n==0 {break}; s.write_all(&b[..n]).unwrap(); } }); }
}
