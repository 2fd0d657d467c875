-- The tables as the first release makes them.
CREATE TABLE schema_version (
	version INTEGER NOT NULL, 
	PRIMARY KEY (version)
);
CREATE TABLE jobs (
	position INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	job_id VARCHAR(64) NOT NULL, 
	group_id VARCHAR(64) NOT NULL, 
	index_in_group INTEGER NOT NULL, 
	kind VARCHAR(8) NOT NULL, 
	owner VARCHAR(128) NOT NULL, 
	model TEXT NOT NULL, 
	request TEXT NOT NULL, 
	output TEXT NOT NULL, 
	created_at FLOAT NOT NULL, 
	state VARCHAR(16) NOT NULL, 
	started_at FLOAT, 
	finished_at FLOAT, 
	attempts INTEGER NOT NULL, 
	error_code TEXT, 
	error_message TEXT, 
	error_param TEXT, 
	file_key VARCHAR(128), 
	content_type VARCHAR(64), 
	file_bytes BIGINT, 
	run_s FLOAT, 
	prompt_tokens INTEGER, 
	image_tokens INTEGER, 
	idempotency_key VARCHAR(256), 
	UNIQUE (group_id, index_in_group), 
	CONSTRAINT one_use_of_a_key UNIQUE (owner, idempotency_key, index_in_group), 
	UNIQUE (job_id)
);
CREATE INDEX jobs_by_owner ON jobs (kind, owner, position);
CREATE INDEX jobs_by_finish ON jobs (finished_at, job_id);
CREATE INDEX jobs_by_state ON jobs (state);
INSERT INTO schema_version VALUES (1);
