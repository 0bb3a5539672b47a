-- The sample database of prefork-socketmap.toml. To make it, in this directory:
--     python3 -c 'import sqlite3; sqlite3.connect("sample.sqlite").executescript(open("sample.sql").read())'
BEGIN;
CREATE TABLE IF NOT EXISTS aliases (
    address TEXT NOT NULL,
    destination TEXT NOT NULL,
    PRIMARY KEY (address, destination)
) WITHOUT ROWID;
INSERT OR IGNORE INTO aliases VALUES
    ('info@example.com', 'alice@example.com'),
    ('sales@example.com', 'alice@example.com'),
    ('sales@example.com', 'bob@example.com');
COMMIT;
